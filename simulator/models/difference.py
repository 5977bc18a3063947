"""Find how a model was pruned, from its shapes and those of the dense model: :func:`difference`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace

from simulator.display import runs, with_and
from simulator.engines.engine import sparsity_note
from simulator.models.form import PLAIN
from simulator.models.model import PARTS, Layer, Model
from simulator.models.quantization import FORMATS, formats_text
from simulator.models.sublayers import Experts, Linear, Mlp
from simulator.models.sublayers.base import Sublayer

# number of a layer, the dense layer without removed sublayers, and the pruned layer
_Change = tuple[int, Layer, Layer]
_EXPERTS = {"experts": "{}", "active experts": "{} active"}
_WIDTHS = {
    "heads": "{} heads",
    "KV heads": "{} key/value heads",
    "value heads": "{} value heads",
    "key heads": "{} key heads",
    "Mamba heads": "{} Mamba heads",
    "Mamba channels": "{} Mamba channels",
    "Mamba state": "a Mamba state of {}",
    "inner width": "an MLP of {}",
    "expert width": "experts of a width of {}",
    "latent features": "experts on {} latent features",
    "head_dim": "{} features of a head",
    "rank": "a latent of {}",
    "query_rank": "queries of a rank of {}",
}
"""Name of a size, or field of attention -> text with the size."""


def difference(dense: Model, pruned: Model) -> tuple[str, ...]:
    """Return the pruning families found in a model; layers are matched by numbers in a checkpoint,
    or in order."""
    numbers = pruned.layer_numbers
    news = pruned.layers
    olds = _matched(dense, pruned)
    changes = tuple(zip(numbers, map(_without, olds, news), news))
    # each step turns the model before it into one that is closer to the pruned model, from the
    # dense model on
    remaining = replace(dense, layers=tuple(old for _, old, _ in changes), numbers=numbers)
    fewer = replace(remaining, layers=tuple(_with_experts(old, new) for _, old, new in changes))
    narrower = replace(fewer, layers=tuple(map(_plain, news)))
    factorised = replace(fewer, layers=tuple(map(_unrotated, news)))
    crossed = replace(
        factorised, layers=news, hidden=pruned.hidden, norm=pruned.norm, tied=pruned.tied
    )
    other = replace(crossed, vocab=pruned.vocab, learned_positions=pruned.learned_positions)
    steps = (
        (_depth(dense, pruned, olds), remaining),
        (_experts(changes), fewer),
        (_width(changes), narrower),
        (_low_rank(numbers, olds, news), factorised),
        (_cross(dense, pruned), crossed),
        (_other(dense, pruned), other),
    )
    lines = []
    last = dense
    for words, model in steps:
        if words:
            lines.append(words + _share(last.parameters - model.parameters, dense.parameters))
        last = model
    if more := pruned.parameters - last.parameters:
        lines.append(
            f"{abs(more):,} parameters {'more' if more > 0 else 'fewer'} in biases, norms or the"
            " head"
        )
    return (*lines, *_zeros_and_formats(dense, pruned))


def _share(removed: int, parameters: int) -> str:
    text = f" ({removed / parameters:.1%} of the parameters)".replace("%", " %")
    return text if removed > 0 else ""


def _zeros_and_formats(dense: Model, pruned: Model) -> Iterator[str]:
    """Yield what differs in the stored weights, not in their shapes."""
    if pruned.sparse24 and not dense.sparse24:
        yield "semi_structured: 2:4 in the projections"
    if pruned.declared and pruned.declared != dense.declared:
        yield sparsity_note(pruned.declared)
    formats = {name: (getattr(dense, name), getattr(pruned, name)) for name in FORMATS}
    if moved := {name: new or "16 bits" for name, (old, new) in formats.items() if new != old}:
        yield formats_text(moved)


def _matched(dense: Model, pruned: Model) -> tuple[Layer, ...]:
    """Return the dense layer of each pruned one: that of its number, or, if the layers of a hybrid
    were renumbered, the next one of its kind."""
    news = pruned.layers
    olds = dense.layers
    by_number = dict(zip(dense.layer_numbers, olds))
    if not by_number.keys() >= set(pruned.layer_numbers):
        return (olds * (1 + len(news) // max(len(olds), 1)))[: len(news)]
    if not pruned.numbers and len(news) < len(olds):
        rest = iter(olds)
        alike = [next((old for old in rest if _kinds(old) == _kinds(new)), None) for new in news]
        found = tuple(old for old in alike if old is not None)
        if len(found) == len(news):
            return found
    return tuple(by_number[number] for number in pruned.layer_numbers)


def _kinds(layer: Layer) -> tuple[str, ...]:
    return tuple(s.label for s in layer.sublayers)


def _without(old: Layer, new: Layer) -> Layer:
    """Return a layer without the sublayers that were removed or became one product."""
    for part in PARTS:
        if not new.has(part) or isinstance(new.of(part), Linear):
            old = old.without(part)
    return old


def _with_experts(old: Layer, new: Layer) -> Layer:
    before = old.of("mlp")
    after = new.of("mlp")
    if not (isinstance(before, Experts) and isinstance(after, Experts)):
        return old
    return old.with_part("mlp", replace(before, experts=after.experts, active=after.active))


def _plain(layer: Layer) -> Layer:
    """Return a layer whose weights are stored plainly, of the usual outputs."""
    return _unrotated(layer).each(
        lambda s: s.with_forms({role: PLAIN for role, form in s.forms if form.rank is not None})
    )


def _unrotated(layer: Layer) -> Layer:
    def usual(sublayer: Sublayer) -> Sublayer:
        straight = replace(sublayer, rotates=False)
        return replace(straight, out=0) if isinstance(straight, Mlp) else straight

    return layer.each(usual)


def _depth(dense: Model, pruned: Model, olds: Sequence[Layer]) -> str:
    texts = []
    numbers = pruned.layer_numbers
    places = dense.layer_numbers
    gone = sorted(set(places) - set(numbers))
    if len(numbers) > len(places):
        texts.append(f"{len(numbers)} layers, not {len(places)}")
    elif gone:
        known = gone[0] < numbers[-1]  # a renumbered checkpoint does not show which layers
        kinds = _by_kind(dense, olds)
        which = f"layers {runs(gone)} removed" + (f" ({kinds})" if kinds else "")
        count = f"{kinds or len(gone)} of {len(places)} layers removed"
        texts.append(which if known else count)
    for part, name in (("attention", "attention"), ("mlp", "MLP")):
        pairs = list(zip(numbers, olds, pruned.layers))
        if off := [i for i, old, new in pairs if old.has(part) and not new.has(part)]:
            texts.append(f"{name} of layers {runs(off)} removed")
        linear = [
            i
            for i, old, new in pairs
            if isinstance(new.of(part), Linear) and not isinstance(old.of(part), Linear)
        ]
        if linear:
            texts.append(f"{name} of layers {runs(linear)} one product")
    return f"depth: {', '.join(texts)}" if texts else ""


def _by_kind(dense: Model, remaining: Sequence[Layer]) -> str:
    """Return the kinds of removed sublayers, if a model has several kinds of layers."""
    if len({_kinds(layer) for layer in dense.layers}) == 1:
        return ""
    kinds = Counter(dense.kinds) - Counter(kind for layer in remaining for kind in _kinds(layer))
    return with_and([f"{many} {kind}" for kind, many in kinds.items() if kind])


def _sizes(layer: Layer) -> dict[str, float]:
    attention = layer.of("attention")
    fields = {name: getattr(attention, name, 0) for name in ("head_dim", "rank", "query_rank")}
    return fields | {name: size for s in layer.sublayers for name, size in s.sizes().items()}


def _cuts(changes: Iterable[_Change], fields: Mapping[str, str]) -> Iterator[tuple[str, list[int]]]:
    """Yield a text such as "4 to 26 of 32 heads" for each size that changed, and the numbers of its
    layers."""
    sizes = [(number, _sizes(old), _sizes(new)) for number, old, new in changes]
    for name, words in fields.items():
        pairs = {i: (old.get(name, 0), new.get(name, 0)) for i, old, new in sizes}
        cut = {i: pair for i, pair in pairs.items() if pair[0] != pair[1]}
        if cut:
            before, after = zip(*cut.values())
            yield words.format(f"{_range(after)} of {_range(before)}"), list(cut)


def _experts(changes: Sequence[_Change]) -> str:
    cuts = _cuts(changes, _EXPERTS)
    texts = [f"{words} in layers {runs(layers)}" for words, layers in cuts]
    return f"experts: {', '.join(texts)}" if texts else ""


def _width(changes: Sequence[_Change]) -> str:
    cuts = list(_cuts(changes, _WIDTHS))
    texts = [words for words, _ in cuts]
    layers = sorted({i for _, numbers in cuts for i in numbers})
    return f"width in layers {runs(layers)}: {', '.join(texts)}" if texts else ""


def _range(values: Iterable[float]) -> str:
    low, *_, high = [f"{v:,g}" if v < 1e6 else f"{v:,.0f}" for v in sorted(values)] * 2
    return low if low == high else f"{low} to {high}"


def _low_rank(numbers: Sequence[int], olds: Sequence[Layer], news: Sequence[Layer]) -> str:
    cut = [
        (i, _ranks(new))
        for i, old, new in zip(numbers, olds, news)
        if _ranks(new) and _ranks(new) != _ranks(old)
    ]
    if not cut:
        return ""
    roles = ", ".join(dict.fromkeys(role for _, ranks in cut for role in ranks))
    sizes = _range(rank for _, ranks in cut for rank in ranks.values())
    return f"low_rank in layers {runs(i for i, _ in cut)}: ranks of {sizes} in {roles}"


def _ranks(layer: Layer) -> dict[str, int]:
    forms = sorted((role, form) for s in layer.sublayers for role, form in s.forms if form.rank)
    return {role: form.rank for role, form in forms}


def _cross(dense: Model, pruned: Model) -> str:
    texts = []
    if pruned.hidden != dense.hidden:
        texts.append(f"hidden {pruned.hidden:,} of {dense.hidden:,}")
    new, old = (sum(s.rotates for s in model.sublayers) for model in (pruned, dense))
    if many := new - old:
        texts.append(f"{many} residual projections")
    return f"width_cross: {', '.join(texts)}" if texts else ""


def _other(dense: Model, pruned: Model) -> str:
    named = {"vocab": "vocabulary", "learned_positions": "table of positions"}
    pairs = {words: (getattr(dense, name), getattr(pruned, name)) for name, words in named.items()}
    return ", ".join(
        f"{words}: {new:,} of {old:,}" for words, (old, new) in pairs.items() if old != new
    )
