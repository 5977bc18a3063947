"""Training-free pruning of a real decoder, a method for every family: criteria published for each, applied without fine-tuning.

Use :func:`calibrate` once on calibration text, then :func:`apply` for a family and a fraction: it returns the changed decoder, the rule of
a dynamic method, and the fraction really removed, with the same rounding as :mod:`simulator.pruning`. :data:`METHODS` names the methods.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from calibration.execute.quality_model import PARTS, Decoder, Layer, Rule, token_losses
from calibration.execute.quality_rules import (
    SINKS,
    AttentionBlocks,
    CacheEviction,
    PromptDropping,
    TokenSkipping,
    UnitChoice,
)
from simulator.pruning._edits import aligned, whole_share

ALIGN = 16
"""Widths and ranks are rounded up to a multiple of this, as the simulator's families do."""

INPUT_OF: Mapping[str, str] = MappingProxyType(
    {"q": "attention", "k": "attention", "v": "attention", "o": "o", "gate": "mlp", "up": "mlp", "down": "down"}
)
"""Which activations a projection reads."""


@dataclass(frozen=True)
class Calibration:
    """What the dense model does on calibration text.

    Attributes
    ----------
    second : mapping (layer, input) -> (features, features)
        Second moments of the inputs of projections, summed over tokens.
    influence : tensor (layers,)
        Block influence: 1 - mean cosine similarity of the residual stream before and after a layer.
    similarity : tensor (layers, 2, tokens)
        Cosine similarity of the residual stream before and after each sublayer, by token.
    stream : tensor (hidden, hidden)
        Second moments of the residual stream, each token scaled to unit norm, over all sublayer inputs.
    position : tensor (tokens,)
        Place of each token in its window.
    """

    second: Mapping[tuple[int, str], Tensor]
    influence: Tensor
    similarity: Tensor
    stream: Tensor
    position: Tensor


class Applied(NamedTuple):
    """A pruned decoder, the rule of its dynamic decisions, and the fraction removed."""

    decoder: Decoder
    rule: Rule
    realised: float


class _Watch(Rule):
    """Collects what :class:`Calibration` holds."""

    def __init__(self, decoder: Decoder) -> None:
        hidden = decoder.embedding.shape[1]
        self.second: dict[tuple[int, str], Tensor] = {}
        self.similarity: dict[tuple[int, str], list[Tensor]] = {}
        self.stream = torch.zeros(hidden, hidden)
        self.first: Tensor = torch.zeros(0)
        self.influence = torch.zeros(len(decoder.layers))

    def observe(self, layer: int, where: str, value: Tensor) -> None:
        moments = value.T @ value
        before = self.second.get((layer, where))
        self.second[layer, where] = moments if before is None else before + moments

    def after(self, layer: int, part: str, before: Tensor, x: Tensor) -> None:
        self.similarity.setdefault((layer, part), []).append(torch.cosine_similarity(before, x, dim=-1))
        unit = before / before.norm(dim=-1, keepdim=True)
        self.stream += unit.T @ unit
        if part == PARTS[0]:
            self.first = before
        else:
            self.influence[layer] += (1.0 - torch.cosine_similarity(self.first, x, dim=-1)).sum()


def calibrate(
    decoder: Decoder, windows: Sequence[Tensor], progress: Callable[[int, int], None] | None = None
) -> Calibration:
    """Run the dense model over calibration windows.

    Parameters
    ----------
    decoder : Decoder
    windows : sequence of int64 tensors
        Text that the evaluation does not see.
    progress : callable, optional
        Called with windows done and their number.

    Returns
    -------
    Calibration
    """
    watch = _Watch(decoder)
    for done, ids in enumerate(windows):
        token_losses(decoder, ids, watch, len(ids) - 1)
        if progress is not None:
            progress(done + 1, len(windows))
    tokens = sum(len(ids) for ids in windows)
    table = [torch.stack([torch.cat(watch.similarity[i, part]) for part in PARTS]) for i in range(len(decoder.layers))]
    position = torch.cat([torch.arange(len(ids)) for ids in windows])
    return Calibration(watch.second, watch.influence / tokens, torch.stack(table), watch.stream, position)


# -- weights ----------------------------------------------------------------------------------------------------------------------


def drop_layers(decoder: Decoder, sparsity: float, seen: Calibration) -> Applied:
    """Depth: the layers of least block influence go (ShortGPT, arXiv 2403.03853)."""
    many = int(whole_share(sparsity, len(decoder.layers)))
    gone = set(seen.influence.argsort()[:many].tolist())
    kept = tuple(layer for i, layer in enumerate(decoder.layers) if i not in gone)
    return Applied(replace(decoder, layers=kept), Rule(), many / len(decoder.layers))


def narrow(decoder: Decoder, sparsity: float, seen: Calibration) -> Applied:
    """Width: KV groups and MLP channels of least activation-weighted magnitude go (Wanda-sp in FLAP, arXiv 2312.11983)."""
    groups, inner = decoder.kv_heads, decoder.layers[0].down.shape[1]
    keep_groups = max(int(whole_share(1.0 - sparsity, groups)), 1)
    keep_inner = int(aligned(np.array(inner), np.array(1.0 - sparsity), ALIGN))
    layers, before, after = [], 0, 0
    for i, layer in enumerate(decoder.layers):
        heads = _saliency(layer.o, seen.second[i, "o"]).sum(0).view(groups, -1).sum(1)
        group = torch.zeros(groups, dtype=torch.bool)
        group[heads.argsort(descending=True)[:keep_groups]] = True
        features = group.repeat_interleave(layer.o.shape[1] // groups)
        channel = torch.zeros(inner, dtype=torch.bool)
        channel[_saliency(layer.down, seen.second[i, "down"]).sum(0).argsort(descending=True)[:keep_inner]] = True
        layers.append(replace(layer, o=layer.o * features, down=layer.down * channel))
        rows = (
            sum(getattr(layer, n).numel() for n in "qkvo"),
            sum(getattr(layer, n).numel() for n in ("gate", "up", "down")),
        )
        before += sum(rows)
        after += rows[0] * keep_groups // groups + rows[1] * keep_inner // inner
    return Applied(replace(decoder, layers=tuple(layers)), Rule(), 1.0 - after / before)


def slice_hidden(decoder: Decoder, sparsity: float, seen: Calibration) -> Applied:
    """Width across layers: the residual stream keeps its leading principal components (SliceGPT, arXiv 2401.15024), the same ones in all
    layers, so no residual projections are needed."""
    hidden = decoder.embedding.shape[1]
    kept = int(aligned(np.array(hidden), np.array(1.0 - sparsity), ALIGN))
    _, vectors = torch.linalg.eigh(seen.stream.double())
    basis = vectors[:, -kept:].float()
    onto = basis @ basis.T
    layers = tuple(
        replace(layer, o=onto @ layer.o, down=onto @ layer.down, biases=_onto(layer, onto)) for layer in decoder.layers
    )
    return Applied(replace(decoder, embedding=decoder.embedding @ onto, layers=layers), Rule(), 1.0 - kept / hidden)


def _onto(layer: Layer, onto: Tensor) -> tuple[tuple[str, Tensor], ...]:
    return tuple((name, onto @ b if name in ("o", "down") else b) for name, b in layer.biases)


def two_of_four(decoder: Decoder, sparsity: float, seen: Calibration) -> Applied:
    """2:4: of every four weights along K the two of least |weight| x input norm go (Wanda, arXiv 2306.11695)."""

    def mask(weight: Tensor, second: Tensor) -> Tensor:
        fours = _saliency(weight, second).view(len(weight), -1, 4)
        keep = torch.zeros_like(fours, dtype=torch.bool).scatter_(-1, fours.topk(2, dim=-1).indices, True)
        return weight * keep.view_as(weight)

    return Applied(_each(decoder, seen, mask), Rule(), 0.5)


def scatter_zeros(decoder: Decoder, sparsity: float, seen: Calibration) -> Applied:
    """Unstructured: in every row the weights of least |weight| x input norm go (Wanda, arXiv 2306.11695)."""

    def mask(weight: Tensor, second: Tensor) -> Tensor:
        saliency = _saliency(weight, second)
        many = int(whole_share(sparsity, weight.shape[1]))
        return weight.scatter(1, saliency.argsort(dim=1)[:, :many], 0.0)

    return Applied(_each(decoder, seen, mask), Rule(), sparsity)


def factorise(decoder: Decoder, sparsity: float, seen: Calibration) -> Applied:
    """Low rank: each weight keeps the directions of its outputs with most energy on calibration data, which is its truncated SVD
    after scaling by the inputs' second moments (SVD-LLM, arXiv 2403.07378)."""
    removed = [0, 0]

    def cut(weight: Tensor, second: Tensor) -> Tensor:
        n, k = weight.shape
        exact = np.floor((1.0 - sparsity) * n * k / (n + k) + 1e-9)
        rank = int(min(max(np.ceil(exact / ALIGN), 1) * ALIGN, n, k))
        removed[0] += n * k
        removed[1] += rank * (n + k)
        return truncated(weight, second, rank)

    out = _each(decoder, seen, cut)
    return Applied(out, Rule(), max(0.0, 1.0 - removed[1] / removed[0]))


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
    layers = []
    for i, layer in enumerate(decoder.layers):
        layers.append(replace(layer, **{n: change(getattr(layer, n), seen.second[i, INPUT_OF[n]]) for n in INPUT_OF}))
    return replace(decoder, layers=tuple(layers))


# -- per token --------------------------------------------------------------------------------------------------------------------


def skip_tokens(decoder: Decoder, sparsity: float, seen: Calibration) -> Applied:
    """Dynamic depth: tokens whose residual stream the sublayer before changed least skip this one; sublayers of redundant layers are
    skipped more often (similarity as in FFN-SkipLLM, arXiv 2404.03865). Keys and values stay dense."""
    similarity = seen.similarity[..., seen.position >= SINKS]
    limit = similarity.flatten().kthvalue(max(1, round(similarity.numel() * (1.0 - sparsity)))).values
    share = (similarity > limit).float().mean(-1)
    return Applied(decoder, TokenSkipping(share), float(share.mean()))


def choose_units(decoder: Decoder, sparsity: float, seen: Calibration) -> Applied:
    """Dynamic width: of all (token, group) pairs of a sublayer those of least contribution are left out. The choice looks at what the
    groups would give, so it bounds what a router could reach (contextual sparsity, Deja Vu, arXiv 2310.17157)."""
    return Applied(decoder, UnitChoice(sparsity), sparsity)


def local_blocks(decoder: Decoder, sparsity: float, seen: Calibration) -> Applied:
    """Sparse attention: the first block of keys and the nearest ones (A-shape, StreamingLLM, arXiv 2309.17453)."""
    return Applied(decoder, AttentionBlocks(sparsity, "local"), sparsity)


def vertical_slash(decoder: Decoder, sparsity: float, seen: Calibration) -> Applied:
    """Sparse attention: blocks on the columns and diagonals that the last queries attend to most (MInference, arXiv 2407.02490)."""
    return Applied(decoder, AttentionBlocks(sparsity, "vertical-slash"), sparsity)


def drop_prompt(decoder: Decoder, sparsity: float, seen: Calibration) -> Applied:
    """Token: prompt tokens that the last one attends to least are dropped after layer 2 (FastV, arXiv 2403.06764)."""
    return Applied(decoder, PromptDropping(sparsity), sparsity)


def evict(decoder: Decoder, sparsity: float, seen: Calibration) -> Applied:
    """KV cache: of the prompt stay the most recent positions and those with most attention, half and half (H2O, arXiv 2306.14048)."""
    return Applied(decoder, CacheEviction(sparsity), sparsity)


class Method(NamedTuple):
    """A method: the family it belongs to, what applies it, the fractions it is measured at, options of the simulator's family."""

    family: str
    function: Callable[[Decoder, float, Calibration], Applied]
    fractions: tuple[float, ...]
    options: tuple[tuple[str, object], ...] = ()


METHODS: Mapping[str, Method] = MappingProxyType(
    {
        "block influence": Method("depth", drop_layers, (0.0333, 0.1, 0.2)),
        "Wanda-sp": Method("width", narrow, (0.05, 0.1, 0.2)),
        "shared PCA slicing": Method("width_cross", slice_hidden, (0.1, 0.2)),
        "Wanda 2:4": Method("semi_structured", two_of_four, (0.5,)),
        "scaled SVD": Method("low_rank", factorise, (0.1, 0.2)),
        "Wanda": Method("unstructured", scatter_zeros, (0.25, 0.5)),
        "similarity skipping": Method("dynamic_depth", skip_tokens, (0.05, 0.1, 0.2)),
        "oracle groups": Method("dynamic_width", choose_units, (0.1, 0.2, 0.3)),
        "A-shape": Method("sparse_attention", local_blocks, (0.25, 0.5)),
        "vertical-slash": Method("sparse_attention", vertical_slash, (0.25, 0.5)),
        "FastV": Method("token", drop_prompt, (0.25, 0.5)),
        "H2O": Method("kv_cache", evict, (0.25, 0.5)),
    }
)
"""Methods by name."""


def apply(method: str, decoder: Decoder, sparsity: float, seen: Calibration) -> Applied:
    """Prune a decoder with a method of :data:`METHODS`; see its function for the criterion."""
    return METHODS[method].function(decoder, sparsity, seen)
