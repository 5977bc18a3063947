"""A decoder in plain Python: its operators as a workload, and its FLOPs and parameters after each family, counted from shapes.

Nothing here calls the code under test: :func:`expected` builds the shapes of the pruned layer from the definition of each family.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from simulator.workload import Kind, Meta, Part, Phase, Workload


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


def projections(d: Decoder) -> dict[str, tuple[int, int]]:
    """Name -> (N, K) of one dense layer."""
    q, kv = d.heads * d.head_dim, d.kv_heads * d.head_dim
    out = {"qkv": (q + 2 * kv, d.hidden)} if d.fused else {"q": (q, d.hidden), "k": (kv, d.hidden), "v": (kv, d.hidden)}
    out["o"] = (d.hidden, q)
    if d.fused:
        out["gate_up"] = (2 * d.inner, d.hidden)
    else:
        out |= {"gate": (d.inner, d.hidden)} if d.gated else {}
        out["up"] = (d.inner, d.hidden)
    return out | {"down": (d.hidden, d.inner)}


ATTENTION = ("q", "k", "v", "qkv", "o")


def workload(d: Decoder, phase: str = "prefill", batch: int = 2, seq: int = 48, new_tokens: int = 3) -> Workload:
    """Operators of a pass, as the lowering's conventions say, in bf16."""
    rows = []
    if phase != "decode":
        rows += _pass(d, Phase.PREFILL, batch, seq, [seq], True)
    if phase != "prefill":
        steps = new_tokens if phase == "generate" else 1
        rows += _pass(d, Phase.DECODE, batch, 1, [seq + 1 + t for t in range(steps)], phase == "decode")
    meta = Meta("tiny", phase, batch, seq, new_tokens if phase == "generate" else 0, "bf16", d.layers, d.hidden)
    return Workload.from_rows(rows, meta)


def _pass(d: Decoder, phase: Phase, batch: int, q_len: int, kv_lens: list[int], owns: bool) -> list[dict[str, object]]:
    tokens, steps, layers, rows = batch * q_len, len(kv_lens), d.layers, []
    inside = {"layer": 0, "layers": layers, "count": layers * steps, "phase": phase}
    outside = {"count": steps, "phase": phase}

    def move(
        role: str, part: Part, n: int, read: float, write: float, params: int = 0, m: int = tokens, **where: object
    ) -> None:
        rows.append(
            {
                "kind": Kind.ELEMENTWISE,
                "role": role,
                "part": part,
                "m": m,
                "n": n,
                "params": params * owns,
                "read_bytes": 2.0 * m * read,
                "write_bytes": 2.0 * m * write,
                **where,
            }
        )

    def gemm(role: str, part: Part, n: int, k: int) -> None:
        rows.append(
            {"role": role, "part": part, "m": tokens, "n": n, "k": k, "params": (n * k + d.bias * n) * owns, **inside}
        )

    h, q, kv = d.hidden, d.heads * d.head_dim, d.kv_heads * d.head_dim
    shapes = projections(d)
    move("embedding", Part.EMBEDDING, h, h, h, d.vocab * h, **outside)
    move("attention_norm", Part.ATTENTION, h, 2 * h, 2 * h, h, **inside)
    for role in ("q", "k", "v", "qkv"):
        if role in shapes:
            gemm(role, Part.ATTENTION, *shapes[role])
    move("rotary", Part.ATTENTION, q + kv, q + kv, q + kv, **inside)
    move("cache_write", Part.ATTENTION, 2 * kv, 2 * kv, 2 * kv, **inside)
    kind = Kind.PREFILL_ATTENTION if phase == Phase.PREFILL else Kind.DECODE_ATTENTION
    for kv_len in kv_lens:
        rows.append(
            {
                "kind": kind,
                "role": "attention",
                "part": Part.ATTENTION,
                "batch": batch,
                "q_len": q_len,
                "kv_len": kv_len,
                "heads": d.heads,
                "kv_heads": d.kv_heads,
                "head_dim": d.head_dim,
                **inside,
                "count": layers,
            }
        )
    gemm("o", Part.ATTENTION, *shapes["o"])
    move("mlp_norm", Part.MLP, h, 2 * h, 2 * h, h, **inside)
    for role in ("gate", "up", "gate_up"):
        if role in shapes:
            gemm(role, Part.MLP, *shapes[role])
    move("activation", Part.MLP, d.inner, (2 if d.gated else 1) * d.inner, d.inner, **inside)
    gemm("down", Part.MLP, *shapes["down"])
    move("final_norm", Part.HEAD, h, 2 * h, h, h, **outside)
    rows.append(
        {
            "role": "lm_head",
            "part": Part.HEAD,
            "m": batch,
            "n": d.vocab,
            "k": h,
            "params": d.vocab * h * owns,
            **outside,
        }
    )
    return rows


# -- the independent count -------------------------------------------------------------------------------------------------------


def nearest(x: float) -> int:
    return math.floor(x + 0.5)


def up_to(x: float, align: int, most: int) -> int:
    return min(max(math.ceil(x / align - 1e-9), 1) * align, most)


def rank_of(s: float, n: int, k: int, align: int = 16) -> int:
    return min(max(math.ceil(math.floor((1 - s) * n * k / (n + k) + 1e-9) / align), 1) * align, n, k)


def causal(queries: int) -> int:
    return sum(range(1, queries + 1))


def passes(phase: str, batch: int, seq: int, new_tokens: int) -> list[tuple[int, int, int]]:
    """(tokens, queries a sequence, keys a sequence) of every pass."""
    out = [(batch * seq, seq, seq)] if phase != "decode" else []
    steps = {"prefill": 0, "decode": 1, "generate": new_tokens}[phase]
    return out + [(batch, 1, seq + 1 + t) for t in range(steps)]


def layer_flops(
    d: Decoder,
    tokens: float,
    pairs: float,
    sequences: float,
    less: float = 1.0,
    dense_kv: bool = False,
    gemm: float = 1.0,
) -> float:
    """FLOPs of a layer: GEMMs over ``less`` of the tokens (k and v over all if ``dense_kv``), attention over ``pairs`` a sequence."""
    total = 0.0
    q, kv = d.heads * d.head_dim, d.kv_heads * d.head_dim
    for name, (n, k) in projections(d).items():
        if dense_kv and name in ("k", "v"):
            total += 2 * tokens * n * k
        elif dense_kv and name == "qkv":
            total += 2 * tokens * k * (q * less + 2 * kv)
        else:
            total += 2 * tokens * less * n * k * gemm
    return total + 4 * sequences * d.heads * d.head_dim * pairs


def expected(
    d: Decoder, phase: str, batch: int, seq: int, new_tokens: int, family: str, s: float, **options: object
) -> tuple[float, float]:
    """FLOPs and parameters of the pruned decoder, without overheads."""
    keep = 1 - s
    layers, thin = d.layers, d
    if family == "depth":
        layers = d.layers - nearest(s * d.layers)
    elif family == "width":
        groups = max(nearest(keep * d.kv_heads), 1)
        inner = up_to(keep * d.inner, int(options.get("align", 16)), d.inner)  # type: ignore[call-overload]
        thin = Decoder(
            d.hidden,
            d.layers,
            groups * (d.heads // d.kv_heads),
            groups,
            d.head_dim,
            inner,
            d.vocab,
            d.gated,
            d.bias,
            d.fused,
        )
    elif family == "width_cross":
        hidden = up_to(keep * d.hidden, 16, d.hidden)
        thin = Decoder(hidden, d.layers, d.heads, d.kv_heads, d.head_dim, d.inner, d.vocab, d.gated, d.bias, d.fused)
    total = 0.0
    for tokens, queries, keys in passes(phase, batch, seq, new_tokens):
        prefill = queries > 1 or keys == queries
        pairs = causal(queries) if prefill else keys
        left = max(nearest(keep * seq), 1)  # prompt tokens left by token or cache pruning
        if family in ("depth", "width", "width_cross"):
            each = [layer_flops(thin, tokens, pairs, batch)] * layers
        elif family == "semi_structured":
            each = [layer_flops(d, tokens, pairs, batch, gemm=0.5)] * layers
        elif family == "unstructured":
            each = [layer_flops(d, tokens, pairs, batch, gemm=keep)] * layers
        elif family == "low_rank":
            pair_of = sum(2 * tokens * rank_of(s, n, k) * (n + k) for n, k in projections(d).values())
            each = [pair_of + 4 * batch * d.heads * d.head_dim * pairs] * layers
        elif family == "dynamic_depth" and options.get("prune_kv"):
            few = max(nearest(keep * queries), 1) if prefill else 1
            seen = causal(few) if prefill else max(nearest(keep * keys), 1)
            each = [layer_flops(d, tokens, seen, batch if prefill else batch * keep, less=keep)] * layers
        elif family in ("dynamic_depth", "dynamic_width"):
            each = [layer_flops(d, tokens, pairs, batch * keep, less=keep, dense_kv=True)] * layers
        elif family == "sparse_attention":
            each = [layer_flops(d, tokens, pairs * keep, batch)] * layers
        elif family == "token":
            start = int(options.get("start", 2))  # type: ignore[call-overload]
            few = layer_flops(
                d, batch * left if prefill else batch, causal(left) if prefill else keys - (seq - left), batch
            )
            each = [layer_flops(d, tokens, pairs, batch)] * start + [few] * (layers - start)
        elif family == "kv_cache":
            each = [layer_flops(d, tokens, pairs if prefill else keys - (seq - left), batch)] * layers
        else:
            raise AssertionError(family)
        total += sum(each) + 2 * batch * thin.vocab * thin.hidden
    weights = 0.0
    for n, k in projections(thin).values():
        share = {"semi_structured": 0.5, "unstructured": keep}.get(family, 1.0)
        weights += (rank_of(s, n, k) * (n + k) if family == "low_rank" else n * k * share) + d.bias * n
    outside = 2 * thin.vocab * thin.hidden + thin.hidden
    return total, layers * (weights + 2 * thin.hidden) + outside
