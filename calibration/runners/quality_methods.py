"""Training-free pruning of a real decoder, a method for every family: published criteria, without fine-tuning.

Use :func:`calibrate` once on calibration text, then :func:`apply` for a method of :data:`METHODS` and a fraction: it
returns the changed decoder, whose rule has the dynamic decisions, and the fraction really removed, with the same
rounding as :mod:`simulator.pruning`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from calibration.runners import quality_rules as rules
from calibration.runners.decoder import families
from calibration.runners.decoder.model import Attention, Decoder, Projection, Sublayer
from calibration.runners.decoder.run import Rule, State, token_losses

INPUT_OF = {"q": "attention", "k": "attention", "v": "attention", "o": "o", "gate": "mlp", "up": "mlp", "down": "down"}
"""Which activations a projection reads."""


@dataclass(frozen=True)
class Calibration:
    """What the dense model does on calibration text; similarities are cosines of the residual stream before and
    after."""

    second: Mapping[tuple[int, str], Tensor]  # by (layer, input): second moments of the inputs of projections, summed
    influence: Tensor  # (layers,): block influence, 1 - mean similarity over a layer
    similarity: Tensor  # (layers, 2, windows, tokens): over each sublayer
    stream: Tensor  # (hidden, hidden): second moments of all sublayer inputs, each token scaled to unit norm


Applied = tuple[Decoder, float]
"""A pruned decoder and the fraction removed."""


class _Watch(rules.Masked):
    """Collects what :class:`Calibration` holds."""

    def __init__(self, decoder: Decoder) -> None:
        self.second: dict[tuple[int, str], Tensor] = {}
        self.similarity: list[Tensor] = []  # of each sublayer in turn
        self.stream = torch.zeros(decoder.hidden, decoder.hidden)
        self.influence = torch.zeros(len(decoder.layers))

    def observe(self, s: State, where: str, value: Tensor) -> None:
        moments, key = value[0].T @ value[0], (s.layer, where)
        self.second[key] = self.second[key] + moments if key in self.second else moments

    def after(self, s: State, part: Sublayer, before: Tensor, x: Tensor) -> None:
        self.similarity.append(torch.cosine_similarity(before, x, dim=-1))
        unit = before / before.norm(dim=-1, keepdim=True)
        self.stream += unit.T @ unit
        if isinstance(part, Attention):
            s.kept["first"] = before
        else:
            self.influence[s.layer] += (1.0 - torch.cosine_similarity(s.kept["first"], x, dim=-1)).sum()


def calibrate(
    decoder: Decoder, windows: Sequence[Tensor], progress: Callable[[str], None] = lambda what: None
) -> Calibration:
    """Run the dense model over windows of one length that the evaluation does not see."""
    watch = _Watch(decoder)
    for ids in windows:
        token_losses(replace(decoder, rule=watch), ids, len(ids) - 1)
        progress("calibration")
    many, length, layers = len(windows), len(windows[0]), len(decoder.layers)
    similarity = torch.stack(watch.similarity).view(many, layers, 2, length).permute(1, 2, 0, 3)
    return Calibration(watch.second, watch.influence / (many * length), similarity, watch.stream)


def drop_layers(decoder: Decoder, sparsity: float, seen: Calibration) -> Applied:
    """Depth: the layers of least block influence go (ShortGPT, arXiv 2403.03853)."""
    many = families.whole_share(sparsity, len(decoder.layers))
    gone = set(seen.influence.argsort()[:many].tolist())
    return families.without_layers(decoder, gone), many / len(decoder.layers)


def narrow(decoder: Decoder, sparsity: float, seen: Calibration) -> Applied:
    """Width: KV groups and channels of least activation-weighted magnitude go (Wanda-sp in FLAP, arXiv 2312.11983)."""
    out = families.narrowed(decoder, sparsity, lambda i, role, p: _saliency(p.weight, seen.second[i, role]).sum(0))
    return out, 1.0 - _parameters(out) / _parameters(decoder)


def slice_hidden(decoder: Decoder, sparsity: float, seen: Calibration) -> Applied:
    """Width across layers: the residual stream keeps its leading principal components (SliceGPT, arXiv 2401.15024), the
    same ones in all layers, so no residual projections are needed."""
    kept = families.aligned(decoder.hidden, 1.0 - sparsity)
    _, vectors = torch.linalg.eigh(seen.stream.double())
    basis = vectors[:, -kept:].float()
    onto = basis @ basis.T

    def write(number: int, role: str, p: Projection) -> Projection:
        if role not in ("o", "down"):
            return p
        return Projection((onto @ p.weight,), None if p.bias is None else onto @ p.bias)

    out = replace(families.each_projection(decoder, write), embedding=decoder.embedding @ onto)
    return out, 1.0 - kept / decoder.hidden


def mask_fours(decoder: Decoder, sparsity: float, seen: Calibration) -> Applied:
    """2:4: of every four weights along K the two of least |weight| x input norm go (Wanda, arXiv 2306.11695)."""
    return _each(decoder, seen, lambda w, second: families.two_of_four(w, _saliency(w, second))), 0.5


def scatter_zeros(decoder: Decoder, sparsity: float, seen: Calibration) -> Applied:
    """Unstructured: in every row the weights of least |weight| x input norm go (Wanda, arXiv 2306.11695)."""

    def mask(weight: Tensor, second: Tensor) -> Tensor:
        least = _saliency(weight, second).argsort(dim=1)[:, : families.whole_share(sparsity, weight.shape[1])]
        return weight.scatter(1, least, 0.0)

    return _each(decoder, seen, mask), sparsity


def factorise(decoder: Decoder, sparsity: float, seen: Calibration) -> Applied:
    """Low rank: each weight keeps the directions of its outputs with most energy on calibration data, which is its
    truncated SVD after scaling by the inputs' second moments (SVD-LLM, arXiv 2403.07378)."""
    shapes = [p.weight.shape for _, _, p in decoder.projections()]
    left = sum(families.rank_left(sparsity, n, k) * (n + k) for n, k in shapes)
    out = _each(decoder, seen, lambda w, second: truncated(w, second, families.rank_left(sparsity, *w.shape)))
    return out, max(0.0, 1.0 - left / _parameters(decoder))


def truncated(weight: Tensor, second: Tensor, rank: int) -> Tensor:
    """The matrix of a rank nearest to ``weight`` in the outputs it gives on inputs with these second moments."""
    n, k = weight.shape
    if n <= k:
        basis = torch.linalg.eigh(weight @ second @ weight.T / second.diagonal().mean())[1][:, -rank:]
    else:  # through the smaller side: outputs for inputs of unit second moments
        values, vectors = torch.linalg.eigh(second / second.diagonal().mean())
        scaled = weight @ (vectors * values.clamp_min(0).sqrt())
        energy, right = torch.linalg.eigh(scaled.T @ scaled)
        basis = torch.linalg.qr(scaled @ (right[:, -rank:] / energy[-rank:].clamp_min(1e-20).sqrt()))[0]
    return basis @ (basis.T @ weight)


def _saliency(weight: Tensor, second: Tensor) -> Tensor:
    """|weight| times the norm of its input over the calibration tokens."""
    return weight.abs() * second.diagonal().clamp_min(0).sqrt()


def _each(decoder: Decoder, seen: Calibration, change: Callable[[Tensor, Tensor], Tensor]) -> Decoder:
    """All projections changed by a function of the weight and its inputs' second moments."""
    return families.each_projection(
        decoder, lambda i, role, p: Projection((change(p.weight, seen.second[i, INPUT_OF[role]]),), p.bias)
    )


def _parameters(decoder: Decoder) -> int:
    """Parameters of the projections' weights."""
    return sum(p.weight.numel() for _, _, p in decoder.projections())


def skip_tokens(decoder: Decoder, sparsity: float, seen: Calibration) -> Applied:
    """Dynamic depth: tokens whose residual stream the sublayer before changed least skip this one; sublayers of
    redundant layers are skipped more often (similarity as in FFN-SkipLLM, arXiv 2404.03865). Keys and values stay
    dense."""
    similarity = seen.similarity[..., rules.SINKS :].flatten(2)
    limit = similarity.flatten().kthvalue(max(1, round(similarity.numel() * (1.0 - sparsity)))).values
    share = (similarity > limit).float().mean(-1)
    return replace(decoder, rule=rules.TokenSkipping(share)), float(share.mean())


Function = Callable[[Decoder, float, Calibration], Applied]


def _under(rule: Callable[[float], Rule]) -> Function:
    """A method that is a rule of its sparsity alone; the rule's docstring names its paper."""
    return lambda decoder, sparsity, seen: (replace(decoder, rule=rule(sparsity)), sparsity)


class Method(NamedTuple):
    """A method: the family it belongs to, what applies it, the fractions it is measured at."""

    family: str
    function: Function
    fractions: tuple[float, ...]


# fmt: off
METHODS: Mapping[str, Method] = {
    "block influence": Method("depth", drop_layers, (0.0333, 0.1, 0.2)),
    "Wanda-sp": Method("width", narrow, (0.05, 0.1, 0.2)),
    "shared PCA slicing": Method("width_cross", slice_hidden, (0.1, 0.2)),
    "Wanda 2:4": Method("semi_structured", mask_fours, (0.5,)),
    "scaled SVD": Method("low_rank", factorise, (0.1, 0.2)),
    "Wanda": Method("unstructured", scatter_zeros, (0.25, 0.5)),
    "similarity skipping": Method("dynamic_depth", skip_tokens, (0.05, 0.1, 0.2)),
    "oracle groups": Method("dynamic_width", _under(rules.UnitChoice), (0.1, 0.2, 0.3)),
    "A-shape": Method("sparse_attention", _under(partial(rules.AttentionBlocks, pattern="local")), (0.25, 0.5)),
    "vertical-slash":
        Method("sparse_attention", _under(partial(rules.AttentionBlocks, pattern="vertical-slash")), (0.25, 0.5)),
    "FastV": Method("token", _under(rules.PromptDropping), (0.25, 0.5)),
    "H2O": Method("kv_cache", _under(rules.CacheEviction), (0.25, 0.5)),
}
"""Methods by name."""
# fmt: on


def apply(method: str, decoder: Decoder, sparsity: float, seen: Calibration) -> Applied:
    """Prune a decoder with a method of :data:`METHODS`; see its function or its rule for the criterion."""
    return METHODS[method].function(decoder, sparsity, seen)
