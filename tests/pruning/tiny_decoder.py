"""Small decoders, and their FLOPs and parameters after each family, counted from shapes in plain
Python.

:func:`expected` calls nothing of the code under test: it builds the shapes of the pruned layer from
the definition of each family.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from shaped import layer, model_of

from simulator.models.lower import lower
from simulator.workload import Workload


@dataclass(frozen=True)
class Decoder:
    hidden: int = 64
    layers: int = 6
    heads: int = 8
    kv_heads: int = 4
    head_dim: int = 16
    inner: int = 176
    vocab: int = 100
    gated: bool = True
    bias: bool = False
    fused: bool = False


GQA = Decoder()
MHA = Decoder(hidden=96, layers=5, heads=6, kv_heads=6, inner=384, gated=False, bias=True)
FUSED = Decoder(fused=True)
DECODERS = {"gqa": GQA, "mha": MHA, "fused": FUSED}


def workload(
    d: Decoder, phase: str = "prefill", batch: int = 2, seq: int = 48, new_tokens: int = 3
) -> Workload:
    attention = {"qkv_bias": d.bias, "o_bias": d.bias}
    mlp = {"gated": d.gated, "bias": d.bias}
    one = layer(d.heads, d.kv_heads, d.inner, d.head_dim, attention=attention, mlp=mlp)
    model = model_of(*[one] * d.layers, hidden=d.hidden, vocab=d.vocab)
    steps = new_tokens if phase in ("generate", "serve") else 0
    engine = "vllm" if d.fused else ""
    return lower(model, phase=phase, batch=batch, seq=seq, new_tokens=steps, engine=engine)


def projections(d: Decoder) -> dict[str, tuple[int, int]]:
    """Name -> (N, K) of one dense layer."""
    q, kv = d.heads * d.head_dim, d.kv_heads * d.head_dim
    out = (
        {"qkv": (q + 2 * kv, d.hidden)}
        if d.fused
        else {"q": (q, d.hidden), "k": (kv, d.hidden), "v": (kv, d.hidden)}
    )
    out["o"] = (d.hidden, q)
    if d.fused:
        out["gate_up"] = (2 * d.inner, d.hidden)
    else:
        out |= {"gate": (d.inner, d.hidden)} if d.gated else {}
        out["up"] = (d.inner, d.hidden)
    return out | {"down": (d.hidden, d.inner)}


def stored(d: Decoder) -> dict[str, tuple[int, int]]:
    """Name -> (N, K) of one dense layer in a checkpoint, which low_rank factorises."""
    return projections(replace(d, fused=False))


def nearest(x: float) -> int:
    return math.floor(x + 0.5)


def up_to(x: float, align: int, most: int) -> int:
    return min(max(math.ceil(x / align - 1e-9), 1) * align, most)


def rank_of(s: float, n: int, k: int) -> int:
    return up_to(math.floor((1 - s) * n * k / (n + k) + 1e-9), 16, min(n, k))


def causal(queries: int) -> int:
    return queries * (queries + 1) // 2


def passes(phase: str, batch: int, seq: int, new_tokens: int) -> list[tuple[int, int, int, int]]:
    """(times, sequences, queries per sequence, keys per sequence) of every pass; a serve has passes
    of one prompt, and decode steps as in the middle of the answer."""
    if phase == "serve":
        return [(batch, 1, seq, seq), (new_tokens, batch, 1, seq + (new_tokens + 1) // 2)]
    out = [(1, batch, seq, seq)] if phase != "decode" else []
    steps = {"prefill": 0, "decode": 1, "generate": new_tokens}[phase]
    return out + [(1, batch, 1, seq + 1 + t) for t in range(steps)]


def layer_flops(
    d: Decoder,
    tokens: float,
    pairs: float,
    sequences: float,
    less: float = 1.0,
    *,
    dense_kv: bool = False,
) -> float:
    """FLOPs of a layer: GEMMs over ``less`` of the tokens (k and v over all if ``dense_kv``),
    attention over pairs."""
    total = 4 * sequences * d.heads * d.head_dim * pairs
    for name, (n, k) in projections(d).items():
        whole = {"k": n, "v": n, "qkv": 2 * d.kv_heads * d.head_dim}.get(name, 0) if dense_kv else 0
        total += 2 * tokens * k * (whole + less * (n - whole))
    return total


def expected(
    d: Decoder,
    phase: str,
    batch: int,
    seq: int,
    new_tokens: int,
    family: str,
    s: float,
    **options: int,
) -> tuple[float, float]:
    """FLOPs and parameters of the pruned decoder, without overheads."""
    keep, layers, thin = 1 - s, d.layers, d
    if family == "depth":
        layers = d.layers - nearest(s * d.layers)
    elif family == "width":
        groups = max(nearest(keep * d.kv_heads), 1)
        inner = up_to(keep * d.inner, options.get("align", 16), d.inner)
        thin = replace(d, heads=groups * (d.heads // d.kv_heads), kv_heads=groups, inner=inner)
    elif family == "width_cross":
        thin = replace(d, hidden=up_to(keep * d.hidden, 16, d.hidden))
    share = {"semi_structured": 0.5, "unstructured": keep}.get(family, 1.0)
    total = 0.0
    for times, several, queries, keys in passes(phase, batch, seq, new_tokens):
        tokens = several * queries
        prefill = queries > 1 or keys == queries
        pairs = causal(queries) if prefill else keys
        left = max(nearest(keep * seq), 1)  # prompt tokens left by token or cache pruning
        cached = keys - (seq - left)
        each = [layer_flops(thin, tokens, pairs, several, share)] * layers
        if family == "low_rank":
            pair_of = sum(2 * tokens * rank_of(s, n, k) * (n + k) for n, k in stored(d).values())
            each = [pair_of + 4 * several * d.heads * d.head_dim * pairs] * layers
        elif family == "dynamic_depth" and options.get("prune_kv"):
            seen = (
                causal(max(nearest(keep * queries), 1)) if prefill else max(nearest(keep * keys), 1)
            )
            each = [
                layer_flops(d, tokens, seen, several if prefill else several * keep, keep)
            ] * layers
        elif family in ("dynamic_depth", "dynamic_width"):
            each = [layer_flops(d, tokens, pairs, several * keep, keep, dense_kv=True)] * layers
        elif family == "sparse_attention":
            each = [layer_flops(d, tokens, pairs * keep, several)] * layers
        elif family == "token":
            start = options.get("start", 2)
            few = layer_flops(
                d, several * (left if prefill else 1), causal(left) if prefill else cached, several
            )
            each = each[:start] + [few] * (layers - start)
        elif family == "kv_cache":
            each = [layer_flops(d, tokens, pairs if prefill else cached, several)] * layers
        total += times * (sum(each) + 2 * several * thin.vocab * thin.hidden)
    weights = 0.0
    for n, k in (stored if family == "low_rank" else projections)(thin).values():
        weights += (
            rank_of(s, n, k) * (n + k) if family == "low_rank" else n * k * share
        ) + d.bias * n
    outside = 2 * thin.vocab * thin.hidden + thin.hidden
    return total, layers * (weights + 2 * thin.hidden) + outside
