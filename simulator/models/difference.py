"""Find how a model was pruned, from its shapes and those of the dense model: :func:`difference`."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from simulator.display import runs
from simulator.engines.engine import sparsity_note
from simulator.models.config import Block, ModelConfig

# number of a layer, the dense layer without removed sublayers, and the pruned layer
_Change = tuple[int, Block, Block]
_WIDTHS = {
    "heads": "{} heads",
    "kv_heads": "{} key/value heads",
    "inner": "an MLP of {}",
    "expert_inner": "experts of a width of {}",
}


def difference(dense: ModelConfig, pruned: ModelConfig) -> tuple[str, ...]:
    """Return the pruning families found in a model; layers are matched by numbers in a checkpoint,
    or in order."""
    numbers, news = pruned.numbers or tuple(range(pruned.layers)), pruned.layout
    at = {number: i for i, number in enumerate(dense.numbers or range(dense.layers))}
    if at.keys() >= set(numbers):
        olds = tuple(dense.layout[at[number]] for number in numbers)
    else:
        olds = (dense.layout * (1 + pruned.layers // dense.layers))[: pruned.layers]
    remaining = tuple(map(_without, olds, news))
    changes = tuple(zip(numbers, remaining, news))
    heads = {"latent": pruned.latent, "head_dim": pruned.head_dim}
    # each step turns the model before it into one that is closer to the pruned model, from the
    # dense model on
    steps: tuple[tuple[str, Iterable[Block], dict[str, Any]], ...] = (
        (_depth(at, numbers, olds, news), remaining, {}),
        (
            _experts(changes),
            (replace(old, experts=new.experts, active=new.active) for _, old, new in changes),
            {},
        ),
        (
            _width(dense, pruned, changes),
            (replace(new, ranks=(), shortcuts=(), out=0) for new in news),
            heads,
        ),
        (_low_rank(numbers, olds, news), (replace(new, shortcuts=(), out=0) for new in news), {}),
        (
            _cross(dense, pruned),
            news,
            {"hidden": pruned.hidden, "norm": pruned.norm, "tied": pruned.tied},
        ),
        (
            _other(dense, pruned),
            news,
            {"vocab": pruned.vocab, "learned_positions": pruned.learned_positions},
        ),
    )
    found, last = [], dense
    for words, blocks, fields in steps:
        now = replace(
            last, layers=len(news), windows=(0,) * len(news), blocks=tuple(blocks), **fields
        )
        share = (last.parameters - now.parameters) / dense.parameters
        if words:
            found.append(
                words
                + (f" ({share:.1%} of the parameters)".replace("%", " %") if share > 0 else "")
            )
        last = now
    if more := pruned.parameters - last.parameters:
        found.append(
            f"{abs(more):,} parameters {'more' if more > 0 else 'fewer'} in biases, norms or the"
            " head"
        )
    if pruned.sparse24 and not dense.sparse24:
        found.append("semi_structured: 2:4 in the projections")
    if pruned.declared and pruned.declared != dense.declared:
        found.append(sparsity_note(pruned.declared))
    if pruned.weight_dtype and pruned.weight_dtype != dense.weight_dtype:
        found.append(f"weights in {pruned.weight_dtype}")
    return tuple(found)


def _attends(block: Block) -> bool:
    return bool(block.heads or "attention" in block.linear)


def _maps(block: Block) -> bool:
    return bool(block.inner or block.experts or "mlp" in block.linear)


def _without(old: Block, new: Block) -> Block:
    """Return a layer without the sublayers that were removed or became one product."""
    if not _attends(new) or "attention" in new.linear:
        old = replace(old, heads=0, kv_heads=0)
    if not _maps(new) or "mlp" in new.linear:
        old = replace(old, inner=0, experts=0, active=0.0, expert_inner=0)
    return replace(old, linear=new.linear)


def _depth(
    were: Collection[int], numbers: Sequence[int], olds: Sequence[Block], news: Sequence[Block]
) -> str:
    found = []
    gone = sorted(set(were) - set(numbers))
    if len(numbers) > len(were):
        found.append(f"{len(numbers)} layers, not {len(were)}")
    elif gone:
        known = gone[0] < numbers[-1]  # a renumbered checkpoint does not show which layers
        found.append(
            f"layers {runs(gone)} removed"
            if known
            else f"{len(gone)} of {len(were)} layers removed"
        )
    for name, has in (("attention", _attends), ("MLP", _maps)):
        pairs = list(zip(numbers, olds, news))
        if off := [i for i, old, new in pairs if has(old) and not has(new)]:
            found.append(f"{name} of layers {runs(off)} removed")
        key = name.lower()
        if one := [i for i, old, new in pairs if key in new.linear and key not in old.linear]:
            found.append(f"{name} of layers {runs(one)} one product")
    return f"depth: {', '.join(found)}" if found else ""


def _cuts(changes: Iterable[_Change], fields: Mapping[str, str]) -> Iterator[tuple[str, list[int]]]:
    """Yield a text such as "4 to 26 of 32 heads" for each field that changed, and the numbers of
    its layers."""
    for name, words in fields.items():
        pairs = {i: (getattr(old, name), getattr(new, name)) for i, old, new in changes}
        cut = {i: pair for i, pair in pairs.items() if pair[0] != pair[1]}
        if cut:
            before, after = zip(*cut.values())
            yield words.format(f"{_range(after)} of {_range(before)}"), list(cut)


def _experts(changes: Sequence[_Change]) -> str:
    cuts = _cuts(changes, {"experts": "{}", "active": "{} active"})
    found = [f"{words} in layers {runs(layers)}" for words, layers in cuts]
    return f"experts: {', '.join(found)}" if found else ""


def _width(dense: ModelConfig, pruned: ModelConfig, changes: Sequence[_Change]) -> str:
    cuts = list(_cuts(changes, _WIDTHS))
    found = [words for words, _ in cuts]
    if dense.head_dim != pruned.head_dim:
        found.append(f"{pruned.head_dim} of {dense.head_dim} features of a head")
    if dense.latent != pruned.latent:
        found.append("other latent widths")
    where = f" in layers {runs(sorted({i for _, layers in cuts for i in layers}))}" if cuts else ""
    return f"width{where}: {', '.join(found)}" if found else ""


def _range(values: Iterable[float]) -> str:
    low, *_, high = [f"{v:,g}" if v < 1e6 else f"{v:,.0f}" for v in sorted(values)] * 2
    return low if low == high else f"{low} to {high}"


def _low_rank(numbers: Sequence[int], olds: Sequence[Block], news: Sequence[Block]) -> str:
    cut = [
        (i, new.ranks)
        for i, old, new in zip(numbers, olds, news)
        if new.ranks and new.ranks != old.ranks
    ]
    if not cut:
        return ""
    roles = ", ".join(dict.fromkeys(role for _, ranks in cut for role, _ in ranks))
    sizes = _range(rank for _, ranks in cut for _, rank in ranks)
    return f"low_rank in layers {runs(i for i, _ in cut)}: ranks of {sizes} in {roles}"


def _cross(dense: ModelConfig, pruned: ModelConfig) -> str:
    found = (
        [f"hidden {pruned.hidden:,} of {dense.hidden:,}"] if pruned.hidden != dense.hidden else []
    )
    new, old = (sum(len(block.shortcuts) for block in model.layout) for model in (pruned, dense))
    if many := new - old:
        found.append(f"{many} residual projections")
    return f"width_cross: {', '.join(found)}" if found else ""


def _other(dense: ModelConfig, pruned: ModelConfig) -> str:
    named = {"vocab": "vocabulary", "learned_positions": "table of positions"}
    pairs = {words: (getattr(dense, name), getattr(pruned, name)) for name, words in named.items()}
    return ", ".join(
        f"{words}: {new:,} of {old:,}" for words, (old, new) in pairs.items() if old != new
    )
