"""Change what a pass computes per token: shares of M, N, K, of keys and of the cache that stay."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from simulator.arrays import Array, FloatArray
from simulator.codes import Kernel, Kind, Part, Phase
from simulator.errors import InputError
from simulator.pruning.described.description import Change
from simulator.pruning.described.sizes import in_layers, row_sizes, tokens_of
from simulator.pruning.dynamic import rows as _rows
from simulator.pruning.dynamic.dynamic_depth import Skipping, computes_keys, skip_tokens
from simulator.pruning.dynamic.dynamic_width import (
    Groups,
    choose_groups,
    choose_heads,
    copies_of,
    groups_of,
    narrow_activations,
    router_rows,
)
from simulator.pruning.dynamic.kv_cache import evict
from simulator.pruning.dynamic.sparse_attention import beyond, skip_keys
from simulator.pruning.dynamic.token import drop_tokens
from simulator.workload import Workload

# operator -> roles of its products
PRODUCTS: dict[str, tuple[str, ...]] = {
    "qkv": ("q", "k", "v", "qkv"),
    "o": ("o",),
    "gate_up": ("gate", "up", "gate_up"),
    "down": ("down",),
    "experts": ("experts",),
    "head": ("lm_head",),
}
_PARTS = {"attention": (Part.ATTENTION,), "mlp": (Part.MLP,), "all": (Part.ATTENTION, Part.MLP)}
# kernel of a method -> kernel of dynamic_depth or dynamic_width
_FAMILY_KERNEL = {
    "dense": "ideal",
    "block-sparse": "ideal",
    "gather": "gathered",
    "looped": "looped",
    "masked": "reference",
    "grouped": "reference",
}
_MOST = 2**31 - 1  # positions
_ZEROS = {"2:4": Kernel.SPARSE24, "unstructured": Kernel.UNSTRUCTURED}


@dataclass(frozen=True)
class Kept:
    """What stays of a prompt; arrays have a value per row of a workload."""

    reach: Array  # tokens of all sequences that reach a layer
    stay: Array  # tokens or positions of all sequences that stay
    drops: Array  # mask of attention in layers before which tokens are dropped


@dataclass(frozen=True)
class Changes:
    """The changes of a method, and the sparsity ``s`` that its expressions name."""

    method: str
    changes: Sequence[Change]
    s: float | FloatArray  # sparsity of all layers, or (L,)
    ideal: bool  # without added work, with dense kernels

    def apply(self, w: Workload) -> tuple[Workload, float | None]:
        """Return the changed workload, and the share of positions that it removes; None if it
        removes other work."""
        realised = None
        if dropped := self._of("prompt"):
            w, realised = self._drop_prompt(w, dropped)
        for change in self.changes:
            if change.axis == "m":
                w = (self._skip if change.operator in _PARTS else self._fewer_tokens)(w, change)
        w = self._narrow(w)
        for change in self._of("experts"):
            w = self._experts(w, change)
        for change in self._of("attention"):
            w, share = self._attention(w, change)
            realised = share if share is not None else realised
        for change in self._of("cache"):
            w, realised = self._evict(w, change)
        return w, realised

    def _of(self, operator: str) -> list[Change]:
        return [c for c in self.changes if c.operator == operator and c.axis != "m"]

    def rows(self, w: Workload, change: Change, mask: Array) -> Array:
        """Return the rows of a mask in the layers of a change; InputError if the model has none."""
        at = np.flatnonzero(mask & ~w.overhead)
        if not len(at):
            raise InputError(
                f"{self.method}: {w.meta.model} has no {change.operator} in {w.meta.phase}"
            )
        return at if change.layers is None else at[in_layers(w, change.layers)[at]]

    def stays(self, w: Workload, at: Array, change: Change, most: Array | float) -> FloatArray:
        """Return what stays of some rows, above 0 and at most ``most``."""
        sizes = row_sizes(w, at, change.stays.names, self.s)
        value = np.broadcast_to(np.asarray(change.stays.value(sizes), dtype=np.float64), at.shape)
        if (wrong := (value <= 0.0) | (value > most)).any():
            raise InputError(
                f"{self.method}: {change.operator} {change.axis} {change.stays.text!r}: expected a"
                f" number above 0 and at most {np.max(most):g}, got {value[wrong][0]:g}"
            )
        return value

    def removed(self, w: Workload, change: Change, mask: Array) -> FloatArray:
        """Return the share that a change removes from each row."""
        at, removed = self.rows(w, change, mask), np.zeros(len(w))
        removed[at] = 1.0 - self.stays(w, at, change, 1.0)
        return removed

    def kept(self, w: Workload) -> Kept | None:
        """Return the tokens or positions of the prompt that stay; None if all stay."""
        if dropped := self._of("prompt"):
            left = 1.0 - self._missing(w, dropped)
            before, layer = np.r_[1.0, left[:-1]], np.maximum(w.layer, 0)
            reach, stay = (
                w.batch * np.maximum(_rows.whole_share(share[layer], w.q_len), 1)
                for share in (before, left)
            )
            drops = np.isin(w.layer, np.flatnonzero(left < before))
            return Kept(reach, stay, drops & (w.kind == Kind.PREFILL_ATTENTION))
        if evicted := self._of("cache"):
            most, _ = self._most(w, evicted[-1])
            stay = w.batch * np.minimum(most, _rows.prompt_of(w))
            return Kept(w.batch * w.q_len, stay, np.zeros(len(w), bool))
        return None

    def _missing(self, w: Workload, changes: Sequence[Change]) -> FloatArray:
        """Return the share of the prompt that is missing in each layer (L,)."""
        missing = np.zeros(_rows.layer_count(w))
        for change in changes:
            s = self.removed(w, change, w.layer >= 0)
            at = np.flatnonzero(s > 0)
            missing[w.layer[at]] = s[at]
        if (np.diff(missing) < 0).any():
            layer = int(np.flatnonzero(np.diff(missing) < 0)[0]) + 1
            raise InputError(
                f"{self.method}: prompt in layer {layer}: expected at most the tokens of the layer"
                " before, as dropped tokens do not return"
            )
        return missing

    def _drop_prompt(self, w: Workload, changes: Sequence[Change]) -> tuple[Workload, float]:
        """Return the workload without some tokens of the prompt, from some layer on."""
        missing = self._missing(w, changes)
        out, share = drop_tokens(w, missing)
        last = (w.layer >= 0) & (w.layer + w.layers == len(missing))
        return out, 1.0 - float(share[last][0])

    def _skip(self, w: Workload, change: Change) -> Workload:
        """Return the workload in which a share of the tokens skips sublayers."""
        inside = (w.layer >= 0) & np.isin(w.part, _PARTS[change.operator])
        s = self.removed(w, change, inside)
        if change.kernel == "skipped":
            return self._run_or_skip(w, change, s)
        skipping = Skipping(
            kernel="ideal" if self.ideal else _FAMILY_KERNEL[change.kernel],
            prune_kv=change.kv == "pruned",
            router=change.router if change.kernel == "masked" else 0,
            whole_layers=change.operator == "all",
            exact=change.tokens == "exact",
            per=change.per,
        )
        out = skip_tokens(w, s, skipping)
        if change.kernel == "block-sparse" and not self.ideal:
            products = np.isin(out.part, _PARTS[change.operator]) & (out.kernel == Kernel.DENSE)
            products &= _rows.projections(out) & (out.m > 0)
            out = _rows.changed(out, products, kernel=Kernel.BLOCK_SPARSE)
        return out

    def _run_or_skip(self, w: Workload, change: Change, s: FloatArray) -> Workload:
        """Return the workload whose operators run for all tokens, or not at all: with one choice
        for all tokens, or if no token needs them."""
        choices = 1.0 if change.shared else np.ceil(np.maximum(tokens_of(w), 1) / change.per)
        runs = np.where(s > 0, 1.0 - s**choices, 1.0)
        if change.kv == "stays":
            runs = np.where(computes_keys(w), 1.0, runs)
        else:
            kept = np.maximum(_rows.whole_share(1.0 - s, w.kv_len), 1)
            w = _rows.changed(w, w.attends & (w.phase == Phase.DECODE) & (s > 0), kv_len=kept)
        return w.replace(count=w.count * runs, params=w.params / np.maximum(runs, 1e-300))

    def _fewer_tokens(self, w: Workload, change: Change) -> Workload:
        """Return the workload with fewer tokens in one product."""
        s = self.removed(w, change, w.is_role(*PRODUCTS[change.operator]))
        if change.kernel == "skipped":
            return self._run_or_skip(w, change, s)
        if change.kernel == "block-sparse" and not self.ideal:
            w = _rows.changed(w, s > 0, kernel=Kernel.BLOCK_SPARSE)
        if change.tokens == "exact":
            return _rows.expected_tokens(w, 1.0 - s)
        return _rows.split_tokens(w, 1.0 - s, change.per)

    def _narrow(self, w: Workload) -> Workload:
        """Return the workload whose products compute a share of their N or read one of their K."""
        narrow = [c for c in self.changes if c.axis in ("n", "k") and c.operator != "experts"]
        if not narrow:
            return w
        queries = np.zeros(len(w))
        for change in narrow:
            if change.operator == "qkv" and change.axis == "n":
                queries = self.removed(w, change, w.is_role("q", "qkv"))
        w, _ = _rows.split_fused_qkv(w, queries)
        outer, inner, s = np.zeros(len(w), bool), np.zeros(len(w), bool), np.zeros(len(w))
        for change in narrow:
            for n, roles in _narrowed(change):
                share = self.removed(w, change, w.is_role(*roles))
                share[(w.stage == 1) if n else (w.stage == 2)] = 0.0
                s = np.where(share > 0, share, s)
                outer |= (share > 0) & n
                inner |= (share > 0) & (not n)
        first = narrow[0]
        for change in narrow:
            alike = ("kernel", "per", "shared", "groups", "align")
            if other := [name for name in alike if getattr(change, name) != getattr(first, name)]:
                raise InputError(
                    f"{self.method}: {change.operator} {other[0]}: expected the same as for"
                    f" {first.operator}, as a kernel computes all products of a choice"
                )
        if first.kernel in _ZEROS:
            kernel = Kernel.DENSE if self.ideal else _ZEROS[first.kernel]
            return _rows.changed(w, outer | inner, kernel=kernel, density=w.density * (1.0 - s))
        groups = Groups(
            outer=outer,
            inner=inner,
            s=s,
            many=groups_of(w, first.groups or 32),
            kernel="ideal" if self.ideal else _FAMILY_KERNEL[first.kernel],
            per=first.per,
            shared=first.shared,
            align=first.align,
        )
        return self._with_groups(w, groups, first)

    def _with_groups(self, w: Workload, groups: Groups, change: Change) -> Workload:
        """Return the workload with projections of chosen groups, and the rows of their kernel."""
        outer, inner, s = groups.outer, groups.inner, groups.s
        out = choose_groups(w, groups)
        if change.kernel == "block-sparse" and not self.ideal:
            edge = np.maximum(np.where(outer, w.n, w.k) // groups.many, 1)
            out = _rows.changed(out, outer, kernel=Kernel.GROUPS_N, block=edge)
            out = _rows.changed(out, inner, kernel=Kernel.GROUPS_K, block=edge)
        activations = np.where(
            w.is_role("quantize_heads"),
            _rows.covering(w, inner & w.is_role("o"), s),
            np.where(
                w.part == Part.MLP,
                _rows.covering(w, outer & (w.part == Part.MLP), s),
                _rows.covering(w, outer & w.is_role("q"), s),
            ),
        )
        out = narrow_activations(out, activations)
        if groups.kernel not in ("gathered", "looped", "reference"):
            return out
        chosen = np.zeros(len(w))
        for part in (Part.ATTENTION, Part.MLP):
            inside = w.part == part
            chosen[inside] = _rows.covering(w, (outer | inner) & inside, s)[inside]
        ends = np.flatnonzero(_rows.sublayer_ends(w) & (chosen > 0))
        groups = replace(groups, s=chosen)
        make = router_rows if groups.kernel == "reference" else copies_of
        return _rows.insert(out, make(w, ends, groups))

    def _experts(self, w: Workload, change: Change) -> Workload:
        """Return the workload with fewer experts per token, or with narrower ones."""
        mask = w.is_role("experts")
        if change.axis == "n":
            s = self.removed(w, change, mask)
            kept = _rows.aligned(w.n, 1.0 - s, change.align)
            return _rows.changed(w, s > 0, n=kept)
        at = self.rows(w, change, mask)
        most = row_sizes(w, at, ("top_k",), self.s)["top_k"]
        active = w.active.copy()
        active[at] *= self.stays(w, at, change, most) / most
        return w.replace(active=active)

    def _attention(self, w: Workload, change: Change) -> tuple[Workload, float | None]:
        """Return the workload whose attention computes a share of its keys or heads."""
        if change.axis == "budget":
            at, budget = self.rows(w, change, w.is_attention), np.full(len(w), _MOST)
            budget[at] = np.ceil(self.stays(w, at, change, _MOST) - 1e-9)
            s, realised = beyond(w, budget)
            return skip_keys(w, s, change.block), realised
        s = self.removed(w, change, w.is_attention)
        if change.axis == "heads":
            return choose_heads(w, s), None
        return skip_keys(w, s, change.block), None

    def _most(self, w: Workload, change: Change) -> tuple[Array, Array]:
        """Return the most positions of the prompt that each row keeps, and a mask of rows that a
        change reaches."""
        prompt = _rows.prompt_of(w)
        if change.axis == "keep":
            s = self.removed(w, change, w.layer >= 0)
            return np.maximum(_rows.whole_share(1.0 - s, prompt), 1), s > 0
        at, most = self.rows(w, change, w.layer >= 0), np.full(len(w), _MOST)
        most[at] = np.ceil(self.stays(w, at, change, _MOST) - 1e-9)
        return most, prompt > most

    def _evict(self, w: Workload, change: Change) -> tuple[Workload, float]:
        """Return the workload with fewer positions in the cache."""
        most, pruned = self._most(w, change)
        everywhere = change.axis == "budget" and change.layers is None
        out, _, realised = evict(w, most, pruned, change.rolling, everywhere=everywhere)
        return out, realised


def _narrowed(change: Change) -> Iterator[tuple[bool, tuple[str, ...]]]:
    """Yield whether a change narrows N, and the roles that it narrows."""
    if change.operator == "mlp":
        yield True, PRODUCTS["gate_up"]
        yield False, PRODUCTS["down"]
    elif change.operator == "all":
        every = (name for roles in PRODUCTS.values() for name in roles)
        yield False, tuple(name for name in every if name not in ("experts", "lm_head"))
    elif change.operator == "qkv" and change.axis == "n":
        yield True, ("q",)
    else:
        yield change.axis == "n", PRODUCTS[change.operator]
