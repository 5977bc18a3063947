"""Published shapes and counts of models, and the tensors of a checkpoint, written down without the
code under test."""

from __future__ import annotations

import csv
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Published:
    """Numbers from a model's card or technical report."""

    family: str  # family of architectures that have the same tensors in a layer
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    inner: int
    vocab: int
    tied: bool
    parameters: int  # total of the published checkpoint
    source: str
    experts: int = 0
    active: int = 0  # routed experts that a token uses
    expert_inner: int = 0
    dense: tuple[int, int] = (0, 0)  # first layers without experts, and the width of their MLP
    # ranks of queries and latent; rotated, plain, value features
    latent: tuple[int, int, int, int, int] | None = None
    # layers, KV heads and MLP width of each run of equal layers
    runs: tuple[tuple[int, int, int], ...] = ()
    # published, 10^9, and a unit of their last digit
    active_parameters: tuple[float, float] = (0.0, 0.0)
    embedded: bool = True  # active parameters include the embedding
    # key and value heads, their features, positions of convolution
    delta: tuple[int, int, int, int, int] | None = None
    attention_every: int = 1  # a layer of so many has attention, the others a gated delta net


def _published(row: dict[str, str]) -> Published:
    """Return a row of ``model_shapes.csv``, whose empty cells have the values of most models."""
    given = {name: text for name, text in row.items() if text and name not in ("model", "note")}
    values: dict[str, Any] = {name: given.pop(name) for name in ("family", "source")}
    runs = (run.split("x") for run in given.pop("runs", "").split())
    values["runs"] = tuple(tuple(map(int, run)) for run in runs)
    active = given.pop("active_parameters", "0 0").split()
    values["active_parameters"] = tuple(map(float, active))
    for name, text in given.items():
        sizes = tuple(int(float(size)) for size in text.split())
        values[name] = sizes if len(sizes) > 1 else sizes[0]
    return Published(**values)


with open(Path(__file__).with_suffix(".csv"), encoding="utf-8", newline="") as file:
    PUBLISHED = {row["model"]: _published(row) for row in csv.DictReader(file)}

with open(Path(__file__).with_name("model_counts.csv"), encoding="utf-8", newline="") as file:
    COUNTED = {row["model"]: int(row["parameters"]) for row in csv.DictReader(file)}
"""Parameters of models whose tensors are not written down here."""


def shape_of(p: Published, layer: int) -> tuple[int, int]:
    """KV heads and MLP width of a layer."""
    if layer < p.dense[0]:
        return p.kv_heads, p.dense[1]
    each = [widths for many, *widths in p.runs for _ in range(many)] or [
        [p.kv_heads, p.inner]
    ] * p.layers
    return each[layer][0], each[layer][1]


def attention_features(p: Published, layer: int) -> int:
    """Return the features of keys and values that a prefill multiplies per query-key pair, over all
    heads."""
    each = sum(p.latent[2:]) if p.latent else 2 * p.head_dim
    return p.heads * each if shape_of(p, layer)[0] and attends(p, layer) else 0


def attends(p: Published, layer: int) -> bool:
    """Whether a layer has attention, not a gated delta net."""
    return layer % p.attention_every == p.attention_every - 1


def layer_tensors(p: Published, layer: int = 0) -> list[Shape]:
    """Return the shapes of the tensors of one layer in a checkpoint of the family, without routed
    experts."""
    kv_heads, i = shape_of(p, layer)
    h, q, kv, d = p.hidden, p.heads * p.head_dim, kv_heads * p.head_dim, p.head_dim
    gated: list[Shape] = [(i, h), (i, h), (h, i)]
    split: list[Shape] = [(q, h), (kv, h), (kv, h), (h, q)]
    norms: list[Shape] = [(h,), (h,)]
    biases: list[Shape] = [(q,), (kv,), (kv,)]
    # bias of o, the MLP, two layer norms
    plain: list[Shape] = [(h,), (i, h), (i,), (h, i), (h,), *norms, *norms]
    routed: list[Shape] = [(p.experts, h)] if layer >= p.dense[0] else []
    score: list[Shape] = [(p.experts,) for _ in routed]  # bias of the router
    mixing = [(2 * q, h), *split[1:], (d,), (d,)] if attends(p, layer) else delta_tensors(p)
    return {
        "llama": [*split, *gated, *norms],
        "qwen2": [*split, *biases, *gated, *norms],
        "qwen3": [*split, (d,), (d,), *gated, *norms],
        "gemma2": [*split, *gated, *norms, *norms],
        "gemma3": [*split, (d,), (d,), *gated, *norms, *norms],
        "olmo2": [*split, (q,), (kv,), *gated, *norms],
        "phi3": [(q + 2 * kv, h), (h, q), (2 * i, h), (h, i), *norms],
        "opt": [*split, *biases, *plain],
        "gpt_neox": [(3 * h, h), (3 * h,), (h, h), *plain],
        "nemotron": [*split, (i, h), (h, i), *norms, *norms],
        "nas": [*([*split, (h,)] if kv else []), *gated, (h,)],
        "mixtral": [*split, *routed, *norms],
        "qwen2_moe": [*split, *biases, *gated, (1, h), *routed, *norms],
        "qwen3_moe": [*split, (d,), (d,), *routed, *norms],
        "gpt_oss": [*split, *biases, (h,), (p.heads,), *routed, (p.experts,), *norms],
        "deepseek_v2": [*latent_tensors(p), *gated, *routed, *norms],
        "deepseek_v3": [*latent_tensors(p), *gated, *routed, *score, *norms],
        "glm4_moe": [*split, *biases, *gated, *routed, *score, *norms],
        "glm4_moe_norm": [*split, *biases, (d,), (d,), *gated, *routed, *score, *norms],
        "qwen3_next": [*mixing, *gated, (1, h), *routed, *norms],
        "llama4": [*split, *gated, *routed, *norms],
    }[p.family]


def delta_tensors(p: Published) -> list[Shape]:
    """Return the tensors of a gated delta net: two projections, convolution, decays, norm of a
    head, and output projection."""
    if not p.delta:
        return []
    key_heads, value_heads, key, value, conv = p.delta
    keys, values, h = key_heads * key, value_heads * value, p.hidden
    own: list[Shape] = [
        (2 * keys + 2 * values, h),
        (2 * value_heads, h),
        (2 * keys + values, 1, conv),
    ]
    return [*own, (value_heads,), (value_heads,), (value,), (h, values)]


def latent_tensors(p: Published) -> list[Shape]:
    """Return the tensors of latent attention: projections to the ranks, their norms, projections
    from the ranks, and output projection."""
    if not p.latent:
        return []
    queries, rank, rotary, plain, value = p.latent
    h, wide = p.hidden, p.heads * (plain + rotary)
    own: list[Shape] = [(queries, h), (queries,), (wide, queries)] if queries else [(wide, h)]
    return [
        *own,
        (rank + rotary, h),
        (rank,),
        (p.heads * (plain + value), rank),
        (h, p.heads * value),
    ]


def expert_tensors(p: Published, layer: int) -> list[Shape]:
    """Tensors of one routed expert of a layer."""
    h, i = p.hidden, p.expert_inner
    if not p.experts or layer < p.dense[0]:
        return []
    biases: list[Shape] = [(2 * i,), (h,)] if p.family == "gpt_oss" else []
    return [(2 * i, h), (h, i), *biases]


def parameters_of(p: Published, experts: int) -> int:
    """Parameters of all layers with so many experts in those that have some."""

    def of(shapes: Iterable[Shape]) -> int:
        return sum(math.prod(shape) for shape in shapes)

    return sum(
        of(layer_tensors(p, i)) + experts * of(expert_tensors(p, i)) for i in range(p.layers)
    )


def outer_tensors(p: Published) -> list[Shape]:
    """Shapes of the tensors outside the layers."""
    norm: list[Shape] = [(p.hidden,)] * (2 if p.family in ("opt", "gpt_neox", "nemotron") else 1)
    tables: list[Shape] = [(p.vocab, p.hidden)] * (1 if p.tied else 2)
    return norm + tables + ([(2050, p.hidden)] if p.family == "opt" else [])


def pass_flops(
    p: Published,
    batch: int,
    seq: int,
    *,
    causal: bool = True,
    every_logit: bool = False,
    window: Mapping[int, int] = {},
) -> int:
    """FLOPs of a prefill, counted matrix by matrix and query by query; ``window`` by layer."""
    total = 0
    for layer in range(p.layers):
        used = layer_tensors(p, layer) + p.active * expert_tensors(p, layer)
        total += sum(2 * batch * seq * s[0] * s[1] for s in used if len(s) == 2)
        reach = window.get(layer, 0) or seq
        pairs = sum(min(i + 1, reach) if causal else seq for i in range(seq))
        total += 2 * batch * attention_features(p, layer) * pairs
        # read, correct and read again the state of each value head
        if p.delta and not attends(p, layer):
            total += 3 * 2 * batch * seq * p.delta[1] * p.delta[2] * p.delta[3]
    return total + 2 * batch * (seq if every_logit else 1) * p.vocab * p.hidden
