"""Find rows of a workload and count their weights; change, add, split and merge rows; reduce their
tokens."""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any

import numpy as np

from simulator.arrays import Array
from simulator.codes import (
    DTYPE_BYTES,
    EXPERTS,
    Kind,
    Part,
    Phase,
    dtype_code,
    role_code,
)
from simulator.errors import InputError
from simulator.pruning._family import PROJECTIONS
from simulator.workload import Workload


def layer_count(w: Workload) -> int:
    """Return the number of layers in the rows, fewer than the model's after depth pruning."""
    return int((w.layer + w.layers).max(initial=0))


def projections(w: Workload, *names: str) -> Array:
    """Return a mask of projections in the layers; without names, of all seven."""
    return w.is_role(*(names or PROJECTIONS)) & (w.layer >= 0)


def writers(w: Workload, *names: str) -> Array:
    """Return a mask of projections with the N of the model: all except first factors of low-rank
    pairs."""
    mask: Array = projections(w, *names) & (w.stage != 1)
    return mask


def readers(w: Workload, *names: str) -> Array:
    """Return a mask of projections with the K of the model: all except second factors of low-rank
    pairs."""
    mask: Array = projections(w, *names) & (w.stage != 2)
    return mask


def coverage(w: Workload, mask: Array) -> tuple[Array, Array]:
    """Return, for every row, the masked row that covers its first layer, and whether there is
    one."""
    at = mask.nonzero()[0]
    if not len(at):
        return np.zeros(len(w), dtype=np.intp), np.zeros(len(w), dtype=bool)
    if len(at) > 1:
        at = at[np.argsort(w.layer[at], kind="stable")]
    place = w.layer[at].searchsorted(w.layer, side="right") - 1
    at = at[np.maximum(place, 0)]
    inside = w.layer < w.layer[at] + np.maximum(w.layers[at], 1)
    return at, (place >= 0) & (w.layer >= 0) & inside


def covering(w: Workload, mask: Array, values: Array) -> Array:
    """Return, for every row, the value of the masked row that covers its first layer, else 0."""
    at, covered = coverage(w, mask)
    return np.where(covered, values[at], 0)


def shorter_copies(w: Workload, out: Workload) -> Workload:
    """Return ``out`` with cache copies as long as its decode attention; ``w`` is the workload
    before pruning."""
    copies = w.is_role("cache_write") & (w.kv_len > 0)
    before, after = (
        covering(x, x.kind == Kind.DECODE_ATTENTION, x.kv_len.astype(np.float64)) for x in (w, out)
    )
    share = np.where(copies & (before > 0), after / np.maximum(before, 1.0), 1.0)
    kept = np.where(copies, np.maximum(np.round(w.kv_len * share), 1), out.kv_len)
    return out.replace(kv_len=kept, **moved(out, share))


def whole_share(share: Array | float, of: Array | float) -> Array:
    """Return ``share`` of ``of``, rounded to the nearest whole number (halves up)."""
    rounded: Array = np.floor(np.asarray(share) * np.asarray(of) + 0.5).astype(np.int64)
    return rounded


def aligned(width: Array, keep: Array, align: Array | int) -> Array:
    """Return the share ``keep`` of ``width``, rounded up to a multiple of ``align``, at most
    ``width``."""
    wanted = np.ceil(keep * width / align - 1e-9).astype(np.int64) * align
    kept: Array = np.minimum(np.maximum(wanted, align), width)
    return kept


def changed(w: Workload, rows: Array, **columns: Any) -> Workload:
    return w.replace(
        **{name: np.where(rows, values, getattr(w, name)) for name, values in columns.items()}
    )


def moved(w: Workload, share: Array) -> dict[str, Array]:
    return {"read_bytes": w.read_bytes * share, "write_bytes": w.write_bytes * share}


def doubled(w: Workload, mask: Array) -> tuple[Workload, Array, Array, Array]:
    """Return the workload with the masked rows twice, origin of each row, and masks of first and
    second copies."""
    index = np.repeat(np.arange(len(w)), np.where(mask, 2, 1))
    second = np.r_[False, index[1:] == index[:-1]]
    return w.take(index), index, mask[index] & ~second, second


def split_at(w: Workload, layer: int) -> Workload:
    """Split rows whose run of layers contains the start of ``layer`` into two rows that share their
    count."""
    across = (w.layer >= 0) & (w.layer < layer) & (w.layer + w.layers > layer)
    out, _, first, second = doubled(w, across)
    layers = np.where(first, layer - out.layer, out.layers - (layer - out.layer))
    out = changed(
        out, first | second, layers=layers, count=out.count * (layers / np.maximum(out.layers, 1))
    )
    return changed(out, second, layer=layer)


def merge_runs(w: Workload) -> Workload:
    """Merge neighbouring rows that differ only in consecutive layers: the inverse of ``expand`` and
    ``split_at``."""
    if len(w) < 2:
        return w
    new = np.ones(len(w), dtype=bool)
    new[1:] = (w.layer[1:] != w.layer[:-1] + w.layers[:-1]) | (w.layers[1:] == 0)
    for name in w.SCHEMA.keys() - {"count", "layer", "layers"}:
        column = getattr(w, name)
        new[1:] |= column[1:] != column[:-1]
    start = np.flatnonzero(new)
    return w.take(start).replace(
        count=np.add.reduceat(w.count, start), layers=np.add.reduceat(w.layers, start)
    )


def sublayer_ends(w: Workload) -> Array:
    """Return a mask of the last projection per sublayer, run of layers and phase: templates of
    added rows."""
    routed = w.is_role("experts") & (w.layer >= 0)
    # experts come after the MLP that they share a sublayer with
    shared = covering(w, routed, np.ones(len(w))) > 0
    ends: Array = routed | (writers(w, "o", "down", "linear") & ~(shared & (w.part == Part.MLP)))
    return ends


def hidden_at(w: Workload, at: Array) -> Array:
    return np.where(w.kind[at] == EXPERTS, w.k[at], w.n[at])


def before_sublayer(w: Workload, rows: Array) -> Array:
    """Return the positions (see :func:`insert`) before the sublayers of some rows."""
    change = np.zeros(len(w), dtype=bool)
    change[1:] = (w.part[1:] != w.part[:-1]) | (w.phase[1:] != w.phase[:-1])
    return np.maximum.accumulate(np.where(change, np.arange(len(w)), 0))[rows] - 0.5


def _stream(w: Workload, at: Array) -> Array:
    """Return format codes of the residual stream at some rows: their format, or bf16 for 8 bits and
    fewer."""
    own = w.dtype[at]
    return np.where(DTYPE_BYTES[own] < 2.0, dtype_code("bf16"), own)


def stream_bytes(w: Workload, at: Array) -> Array:
    return DTYPE_BYTES[_stream(w, at)]


def overheads(w: Workload, at: Array, role: str, **columns: Any) -> Workload:
    """Return elementwise rows in the stream's format, with layer, part, phase and count of the rows
    ``at``."""
    base = {name: getattr(w, name)[at] for name in ("part", "phase", "layer", "layers", "count")}
    stream, code = _stream(w, at), role_code(role)[0]
    columns = {"kind": Kind.ELEMENTWISE, **base, "dtype": stream, "weight_dtype": stream, **columns}
    return Workload.filled(w.meta, size=len(at), role=code, overhead=True, **columns)


def overhead_gemm(
    w: Workload, at: Array, role: str, n: Array | int, k: Array | int, **columns: Any
) -> Workload:
    """Return GEMMs over all tokens of the rows ``at``; they own parameters in the phase that counts
    parameters."""
    # in a generate, the prefill counts the parameters and the decode steps do not
    owns = (w.phase[at] == Phase.PREFILL) | ~(w.phase == Phase.PREFILL).any()
    params = np.where(owns, np.asarray(n, dtype=np.float64) * k / w.repeats[at], 0.0)
    shape = {"m": w.m[at], "n": n, "k": k}
    return overheads(w, at, role, kind=Kind.GEMM, params=params, **{**shape, **columns})


# rows to insert, and the position of each: 2.5 is between the rows 2 and 3
Inserted = list[tuple[Array, Workload]]


def insertion(w: Workload, parts: Inserted) -> Array:
    """Return the order that puts the rows of ``w`` followed by ``parts`` into their places."""
    return np.argsort(np.concatenate([np.arange(len(w)), *[at for at, _ in parts]]), kind="stable")


def insert(w: Workload, parts: Inserted) -> Workload:
    """Return ``w`` with the rows of ``parts`` inserted; equal positions keep their order."""
    return Workload.concat([w, *[rows for _, rows in parts]]).take(insertion(w, parts))


# up to this number of tokens, every outcome of the binomial distribution has its own row
EXACT_TOKENS = 16
# from this number on, only the mean counts, as in capacity-based routers: its sd is below 5 %
CAPACITY_TOKENS = 512
# number of equally likely bins that approximate the distribution between these two numbers
BINS = 5


@lru_cache(maxsize=4096)
def token_points(tokens: int, keep: float) -> tuple[Array, Array]:
    """Return possible numbers of computed tokens, without 0, and their probabilities; the mean is
    ``tokens * keep``. The mean of a bin is divided between the two nearest whole numbers."""
    if tokens <= 0:
        return np.array([tokens]), np.array([1.0])
    if tokens >= CAPACITY_TOKENS:
        means, chance = np.array([tokens * keep]), np.array([1.0])
    else:
        means, chance = _binomial(tokens, keep)
    low = np.floor(means)
    many, inverse = np.unique(np.concatenate([low, low + 1]).astype(np.int64), return_inverse=True)
    shares = np.concatenate([chance * (low + 1 - means), chance * (means - low)])
    chance = np.bincount(inverse.reshape(-1), weights=shares)
    kept = (many > 0) & (chance > 0)
    return many[kept], chance[kept]


def _binomial(tokens: int, keep: float) -> tuple[Array, Array]:
    """Return the outcomes of a binomial distribution, or the means of bins of outcomes, and their
    probabilities."""
    outcome = np.arange(tokens + 1)
    factorial = np.array([math.lgamma(j + 1) for j in range(tokens + 1)])
    choose = factorial[-1] - factorial - factorial[::-1]
    mass = np.exp(choose + outcome * math.log(keep) + (tokens - outcome) * math.log1p(-keep))
    mass /= mass.sum()
    if tokens <= EXACT_TOKENS:
        return outcome, mass
    which = np.minimum((np.cumsum(mass) - mass / 2) * BINS, BINS - 1).astype(np.int64)
    chance = np.bincount(which, weights=mass, minlength=BINS)
    used = chance > 0
    means = np.bincount(which, weights=mass * outcome, minlength=BINS)[used] / chance[used]
    means *= tokens * keep / (means @ chance[used])  # removes rounding errors of the mean
    return np.minimum(means, tokens), chance[used]


def split_tokens(w: Workload, keep: Array, per: int = 1) -> Workload:
    """Split rows with ``keep < 1`` into one row per possible number of tokens, counted by its
    probability; ``per`` neighbouring tokens choose together. Bytes of elementwise and collective
    rows scale with tokens, parameters are conserved."""
    tokens, chosen = tokens_of(w), np.flatnonzero(keep < 1.0)
    if not len(chosen):
        return w
    pairs, inverse = np.unique(
        np.stack([tokens[chosen].astype(np.float64), keep[chosen]]), axis=1, return_inverse=True
    )
    inverse = inverse.reshape(-1)
    points = [_together(int(t), float(p), per) for t, p in pairs.T]
    times, conserve = np.ones(len(w), dtype=np.int64), np.ones(len(w))
    times[chosen] = np.array([len(many) for many, _ in points])[inverse]
    conserve[chosen] = np.array([1.0 / chance.sum() for _, chance in points])[inverse]
    index = np.repeat(np.arange(len(w)), times)
    out, own, split = w.take(index), tokens[index], (keep < 1.0)[index]
    many, chance = own.astype(np.float64), np.ones(len(out))
    many[split], chance[split] = np.concatenate([points[pair] for pair in inverse.tolist()], axis=1)
    return out.replace(
        count=out.count * chance,
        m=np.where(out.m > 0, many, out.m),
        batch=np.where(out.kind == Kind.DECODE_ATTENTION, many, out.batch),
        params=out.params * conserve[index],
        **moved(out, many / np.maximum(own, 1)),
    )


def _together(tokens: int, keep: float, per: int) -> tuple[Array, Array]:
    """Return :func:`token_points` of tokens of which ``per`` choose together."""
    choices, chance = token_points(-(-tokens // per), keep)
    return np.minimum(choices * per, tokens), chance


def expected_tokens(w: Workload, keep: Array) -> Workload:
    """Return the workload with the share ``keep`` of the tokens of each row, rounded up."""
    tokens = tokens_of(w)
    left = np.ceil(tokens * keep - 1e-9).astype(np.int64)
    fewer = keep < 1.0
    return w.replace(
        m=np.where(fewer & (w.m > 0), left, w.m),
        batch=np.where(fewer & (w.kind == Kind.DECODE_ATTENTION), left, w.batch),
        **moved(w, np.where(fewer, left / np.maximum(tokens, 1), 1.0)),
    )


def tokens_of(w: Workload) -> Array:
    """Return the tokens of every row: ``m``, in decode attention ``batch``."""
    return np.where(w.kind == Kind.DECODE_ATTENTION, w.batch, w.m)


def split_fused_qkv(w: Workload, s: Array) -> tuple[Workload, Array]:
    """Split fused qkv projections with sparsity ``s > 0`` into queries and the rest; return the
    rows' sparsity too."""
    keys = covering(w, w.is_attention, w.kv_heads * w.head_dim)
    unsplit = (keys > 0) & (w.n != 2 * keys)
    fused = (s > 0) & w.is_role("qkv") & (w.stage != 1) & unsplit
    if not fused.any():
        return w, s
    if (w.stage[fused] == 2).any():
        reason = "queries of a low-rank fused qkv projection cannot be computed separately"
        raise InputError(f"{reason}; choose an engine that does not fuse them, such as hf")
    out, index, first, rest = doubled(w, fused)
    # queries, and the gate of the outputs if any
    n = np.where(first, out.n - 2 * keys[index], 2 * keys[index])
    out = changed(out, first | rest, n=n, params=out.params * (n / np.maximum(out.n, 1)))
    return changed(out, first, role=role_code("q")[0]), s[index]


def query_share(w: Workload, keep: Array) -> Array:
    """Return the share of rotary and query-key norm left if ``keep`` of the queries and all keys
    stay; else 1."""
    heads, groups = (covering(w, w.is_attention, heads) for heads in (w.heads, w.kv_heads))
    share: Array = (heads * keep + groups) / np.maximum(heads + groups, 1)
    return np.where(w.is_role("rotary", "qk_norm") & (w.layer >= 0), share, 1.0)


def prompt_of(w: Workload) -> Array:
    """Return the prompt positions in the cache of every row's layer, as decode (or prefill) sees
    them; 0 outside."""
    none = np.iinfo(np.int64).max
    out = np.full(layer_count(w) + 1, none)
    decodes = bool((w.kind == Kind.DECODE_ATTENTION).any())
    rows = w.take(w.kind == (Kind.DECODE_ATTENTION if decodes else Kind.PREFILL_ATTENTION))
    # the first decode step sees one position after the prompt; the step of a serve is in the middle
    # of the answer
    grown = (w.meta.new_tokens + 1) // 2 if w.meta.phase == "serve" else 1
    length = rows.kv_len - (grown if decodes else 0)
    for first, many in sorted(set(zip(rows.layer.tolist(), rows.layers.tolist()))):
        run, lengths = (
            slice(first, first + many),
            length[(rows.layer == first) & (rows.layers == many)],
        )
        # the first decode step is the shortest, the last chunk of a prompt the longest
        out[run] = np.minimum(out[run], lengths.min() if decodes else lengths.max())
    out[out == none] = 0
    return np.where(w.layer >= 0, out[np.maximum(w.layer, 0)], 0)
