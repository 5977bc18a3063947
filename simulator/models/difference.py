"""Find how a model was pruned, from its shapes and those of the dense model: :func:`difference`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace

from simulator.display import runs
from simulator.engines.engine import sparsity_note
from simulator.models.form import PLAIN
from simulator.models.model import PARTS, Layer, Model
from simulator.models.sublayers import Attention, DeltaNet, Experts, LatentAttention, Linear, Mlp
from simulator.models.sublayers.base import Sublayer

# number of a layer, the dense layer without removed sublayers, and the pruned layer
_Change = tuple[int, Layer, Layer]
_WIDTHS = {
    "heads": "{} heads",
    "kv_heads": "{} key/value heads",
    "inner": "an MLP of {}",
    "expert_inner": "experts of a width of {}",
}


def difference(dense: Model, pruned: Model) -> tuple[str, ...]:
    """Return the pruning families found in a model; layers are matched by numbers in a checkpoint,
    or in order."""
    numbers, news = pruned.layer_numbers, pruned.layers
    place = {number: i for i, number in enumerate(dense.layer_numbers)}
    if place.keys() >= set(numbers):
        olds = tuple(dense.layers[place[number]] for number in numbers)
    else:
        olds = (dense.layers * (1 + len(news) // max(len(dense.layers), 1)))[: len(news)]
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
        (_depth(place, numbers, olds, news), remaining),
        (_experts(changes), fewer),
        (_width(changes), narrower),
        (_low_rank(numbers, olds, news), factorised),
        (_cross(dense, pruned), crossed),
        (_other(dense, pruned), other),
    )
    lines, last = [], dense
    for words, model in steps:
        share = (last.parameters - model.parameters) / dense.parameters
        if words:
            percent = f" ({share:.1%} of the parameters)".replace("%", " %")
            lines.append(words + (percent if share > 0 else ""))
        last = model
    if more := pruned.parameters - last.parameters:
        lines.append(
            f"{abs(more):,} parameters {'more' if more > 0 else 'fewer'} in biases, norms or the"
            " head"
        )
    if pruned.sparse24 and not dense.sparse24:
        lines.append("semi_structured: 2:4 in the projections")
    if pruned.declared and pruned.declared != dense.declared:
        lines.append(sparsity_note(pruned.declared))
    if pruned.weight_dtype and pruned.weight_dtype != dense.weight_dtype:
        lines.append(f"weights in {pruned.weight_dtype}")
    return tuple(lines)


def _without(old: Layer, new: Layer) -> Layer:
    """Return a layer without the sublayers that were removed or became one product."""
    for part in PARTS:
        if not new.has(part) or isinstance(new.of(part), Linear):
            old = old.without(part)
    return old


def _with_experts(old: Layer, new: Layer) -> Layer:
    before, after = old.of("mlp"), new.of("mlp")
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


def _depth(
    places: Mapping[int, int], numbers: Sequence[int], olds: Sequence[Layer], news: Sequence[Layer]
) -> str:
    texts = []
    gone = sorted(set(places) - set(numbers))
    if len(numbers) > len(places):
        texts.append(f"{len(numbers)} layers, not {len(places)}")
    elif gone:
        known = gone[0] < numbers[-1]  # a renumbered checkpoint does not show which layers
        which = f"layers {runs(gone)} removed"
        texts.append(which if known else f"{len(gone)} of {len(places)} layers removed")
    for part, name in (("attention", "attention"), ("mlp", "MLP")):
        pairs = list(zip(numbers, olds, news))
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


def _sizes(layer: Layer) -> dict[str, float]:
    attention, mlp = layer.of("attention"), layer.of("mlp")
    sizes: dict[str, float] = {}
    if isinstance(attention, Attention | LatentAttention | DeltaNet):
        sizes |= {"heads": attention.heads, "kv_heads": attention.kv_heads}
    if isinstance(mlp, Mlp):
        sizes["inner"] = mlp.inner
    if isinstance(mlp, Experts):
        sizes |= {"inner": mlp.shared_inner, "expert_inner": mlp.inner}
        sizes |= {"experts": mlp.experts, "active": mlp.active}
    return sizes


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
    cuts = _cuts(changes, {"experts": "{}", "active": "{} active"})
    texts = [f"{words} in layers {runs(layers)}" for words, layers in cuts]
    return f"experts: {', '.join(texts)}" if texts else ""


def _width(changes: Sequence[_Change]) -> str:
    cuts = list(_cuts(changes, _WIDTHS))
    texts = [words for words, _ in cuts]
    pairs = [(old.of("attention"), new.of("attention")) for _, old, new in changes]
    features = {
        (old.head_dim, new.head_dim)
        for old, new in pairs
        if isinstance(old, Attention | LatentAttention)
        and isinstance(new, Attention | LatentAttention)
        and old.head_dim != new.head_dim
    }
    if features:
        before, after = sorted(features)[0]
        texts.append(f"{after} of {before} features of a head")
    latents = [
        (old, replace(new, heads=old.heads))
        for old, new in pairs
        if isinstance(old, LatentAttention) and isinstance(new, LatentAttention)
    ]
    if any(_latent_sizes(old) != _latent_sizes(new) for old, new in latents):
        texts.append("other latent widths")
    layers = sorted({i for _, numbers in cuts for i in numbers})
    where = f" in layers {runs(layers)}" if cuts else ""
    return f"width{where}: {', '.join(texts)}" if texts else ""


def _latent_sizes(latent: LatentAttention) -> tuple[int, ...]:
    return latent.query_rank, latent.rank, latent.rotary, latent.plain, latent.value


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
    new, old = (
        sum(s.rotates for layer in model.layers for s in layer.sublayers)
        for model in (pruned, dense)
    )
    if many := new - old:
        texts.append(f"{many} residual projections")
    return f"width_cross: {', '.join(texts)}" if texts else ""


def _other(dense: Model, pruned: Model) -> str:
    named = {"vocab": "vocabulary", "learned_positions": "table of positions"}
    pairs = {words: (getattr(dense, name), getattr(pruned, name)) for name, words in named.items()}
    return ", ".join(
        f"{words}: {new:,} of {old:,}" for words, (old, new) in pairs.items() if old != new
    )
