"""Lowering: a decoder's shapes and a request become the table of operators an inference engine would run.

Use :func:`lower`. What the rows assume, and why:

- Engine-like fusion: a residual addition is part of the norm that follows it, so ``attention_norm`` and ``mlp_norm`` read the stream
  and the last sublayer's output and write the sum and its norm (2 + 2 tensors). The first layer's norm is counted alike, though it has
  nothing to add. Where attention and MLP run on the same input (GPT-NeoX), ``mlp_norm`` only normalises and one ``residual`` row adds
  both outputs.
- Scaling of the embedding, soft-capping of attention, biases and quantisation of activations are fused into their neighbours: no rows,
  no bytes.
- Bytes of token ids, norm weights and rotary tables are left out (below 0.1 % of any pass). Sampling is not part of the pass.
- ``dtype`` is what the layers' GEMMs compute in. With an 8- or 4-bit one, the residual stream, attention, embedding and head stay in bf16.
  ``weight_dtype`` is that of the layers' projections alone: quantised checkpoints keep embedding and head in 16 bits.
- Decode: each sequence adds one token to ``seq`` cached positions and attends to ``seq + 1``.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import groupby
from typing import Any

import numpy as np

from simulator.columns import Array
from simulator.errors import InputError, unknown
from simulator.models.config import ModelConfig
from simulator.models.huggingface import from_hf_config
from simulator.models.library import list_models, load_model
from simulator.models.parallel import Shard, all_gather, all_reduce, sends, shard
from simulator.workload import DTYPE_BYTES, DTYPES, PHASES, Kind, Meta, Part, Phase, Workload, dtype_code

__all__ = ["ModelConfig", "from_hf_config", "list_models", "load_model", "lower", "position_note"]


MAX_TOKENS = 2**40
"""Largest batch x seq; beyond it counts would leave the exact range of float64."""

MAX_DECODES = 1_000_000
"""Largest number of decode steps: each has a row of its own in the attention."""

Row = dict[str, Any]


def lower(
    model: ModelConfig,
    *,
    phase: str = "prefill",
    batch: int = 1,
    seq: int = 2048,
    new_tokens: int = 0,
    dtype: str = "bf16",
    weight_dtype: str | None = None,
    kv_dtype: str | None = None,
    fuse_qkv: bool = False,
    fuse_gate_up: bool = False,
    logits: str = "last",
    devices: int = 1,
    parallel: str = "tensor",
) -> Workload:
    """Operators of one pass of a decoder, one row a shape.

    Parameters
    ----------
    model : ModelConfig
        From :func:`load_model`.
    phase : {"prefill", "decode", "generate"}
        ``generate`` is a prefill of ``seq`` tokens and ``new_tokens`` decodes; parameters are on its prefill rows only.
    batch : int
        Sequences, at least 1.
    seq : int
        Prompt tokens a sequence (prefill, generate) or cached positions (decode), at least 1. More than the model was trained for is
        allowed: see :func:`position_note`.
    new_tokens : int
        Decode steps of a generate.
    dtype, weight_dtype, kv_dtype : str
        Formats of arithmetic, of the projections' weights (default ``dtype``) and of the cache (default: the residual stream's).
    fuse_qkv, fuse_gate_up : bool
        One GEMM for q, k, v; one for gate and up.
    logits : {"last", "all"}
        Positions of a prefill that go through the head.
    devices, parallel : int, {"tensor", "pipeline"}
        See :mod:`simulator.models.parallel`.

    Returns
    -------
    Workload
        The same object for the same arguments (it is immutable).

    Raises
    ------
    InputError
        One line: the argument, what was expected and what came.

    Examples
    --------
    >>> w = lower(load_model("llama-2-7b"), phase="decode", batch=4, seq=1024)
    >>> int(w.parameters)
    6738415616
    """
    if not isinstance(model, ModelConfig):
        raise InputError(f"model: expected a ModelConfig (see load_model), got {type(model).__name__}")
    for what, value, choices in (
        ("phase", phase, PHASES),
        ("logits", logits, ("last", "all")),
        ("dtype", dtype, DTYPES),
    ):
        _choice(what, value, choices)
    for what, optional in (("weight_dtype", weight_dtype), ("kv_dtype", kv_dtype)):
        if optional is not None:
            _choice(what, optional, DTYPES)
    batch, seq = _integer("batch", batch, 1, MAX_TOKENS), _integer("seq", seq, 1, MAX_TOKENS)
    if batch * seq > MAX_TOKENS:
        raise InputError(f"batch x seq: expected at most {MAX_TOKENS} tokens, got {batch * seq}")
    devices, low = _integer("devices", devices, 1, 1_000_000), int(phase == "generate")
    new_tokens = _integer("new_tokens", new_tokens, low, MAX_DECODES if low else 0, f" for phase {phase!r}")
    stream = dtype if DTYPE_BYTES[dtype_code(dtype)] >= 2 else "bf16"
    formats = (dtype, weight_dtype or dtype, kv_dtype or stream, stream)
    return _lower(
        model, phase, batch, seq, new_tokens, formats, bool(fuse_qkv), bool(fuse_gate_up), logits, devices, parallel
    )


def position_note(model: ModelConfig, positions: int) -> str:
    """A sentence where a request has more positions than the model was trained for, else "".

    >>> position_note(load_model("opt-13b"), 4096)
    'opt-13b was trained for 2048 positions, not 4096: times hold, its text may not'
    """
    if positions <= model.max_positions:
        return ""
    return (
        f"{model.name} was trained for {model.max_positions} positions, not {positions}: times hold, its text may not"
    )


def _choice(what: str, value: Any, choices: tuple[str, ...]) -> None:
    if not isinstance(value, str) or value not in choices:
        raise unknown(what, value, choices)


def _integer(what: str, value: Any, low: int, high: int, where: str = "") -> int:
    expected = f"{low}" if low == high else f"an integer from {low} to {high}"
    try:
        number = operator.index(value)
    except TypeError:
        raise InputError(f"{what}: expected {expected}{where}, got {value!r}") from None
    if isinstance(value, bool) or not low <= number <= high:
        raise InputError(f"{what}: expected {expected}{where}, got {value!r}")
    return number


# -- rows ------------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Pass:
    """What the rows of one phase have in common."""

    model: ModelConfig
    part: Shard
    phase: Phase
    batch: int
    q_len: int
    kv_len: int
    head_tokens: int  # positions that go through the head
    steps: int  # executions
    owns: bool  # whether its rows carry the parameters
    formats: tuple[str, str, str, str]  # arithmetic, weights, cache, residual stream
    fuse_qkv: bool
    fuse_gate_up: bool

    @property
    def tokens(self) -> int:
        return self.batch * self.q_len

    def gemm(self, role: str, part: Part, n: int, k: int, bias: bool) -> Row:
        dtype, weight = dtype_code(self.formats[0]), dtype_code(self.formats[1])
        params = (n * k + bias * n) * self.owns
        return {
            "role": role,
            "part": part,
            "m": self.tokens,
            "n": n,
            "k": k,
            "params": params,
            "dtype": dtype,
            "weight_dtype": weight,
        }

    def move(self, role: str, part: Part, n: int, read: float, write: float, params: int = 0, tokens: int = 0) -> Row:
        """An elementwise row over ``tokens`` positions of ``n`` features that reads and writes so many stream elements a position."""
        stream, tokens = dtype_code(self.formats[3]), tokens or self.tokens
        size = float(tokens * DTYPE_BYTES[stream])
        row: Row = {
            "kind": Kind.ELEMENTWISE,
            "role": role,
            "part": part,
            "m": tokens,
            "n": n,
            "params": params * self.owns,
        }
        return row | {"read_bytes": size * read, "write_bytes": size * write, "dtype": stream, "weight_dtype": stream}

    def reduce(self, part: Part) -> list[Row]:
        stream = dtype_code(self.formats[3])
        return [
            row | {"dtype": stream}
            for row in all_reduce(self.part, part, self.tokens, self.model.hidden, DTYPE_BYTES[stream])
        ]


def _attention(p: _Pass) -> Iterator[Row]:
    model, part, h, d = p.model, Part.ATTENTION, p.model.hidden, p.model.head_dim
    q, kv, norm = p.part.heads * d, p.part.kv_heads * d, model.norm_parameters
    cache, stream = dtype_code(p.formats[2]), dtype_code(p.formats[3])
    yield p.move("attention_norm", part, h, 2 * h, 2 * h, norm)
    if p.fuse_qkv:
        yield p.gemm("qkv", part, q + 2 * kv, h, model.qkv_bias)
    else:
        yield p.gemm("q", part, q, h, model.qkv_bias)
        yield p.gemm("k", part, kv, h, model.qkv_bias)
        yield p.gemm("v", part, kv, h, model.qkv_bias)
    if model.qk_norm:
        yield p.move("qk_norm", part, q + kv, q + kv, q + kv, 2 * d)
    if model.rotary_dim:
        turned = (p.part.heads + p.part.kv_heads) * model.rotary_dim
        yield p.move("rotary", part, turned, turned, turned)
    write = 2 * kv * float(DTYPE_BYTES[cache] / DTYPE_BYTES[stream])
    yield p.move("cache_write", part, 2 * kv, 2 * kv, write) | {"weight_dtype": cache}
    yield {
        "kind": Kind.DECODE_ATTENTION if p.phase == Phase.DECODE else Kind.PREFILL_ATTENTION,
        "role": "attention",
        "part": part,
        "batch": p.batch,
        "q_len": p.q_len,
        "kv_len": p.kv_len,
        "heads": p.part.heads,
        "kv_heads": p.part.kv_heads,
        "head_dim": d,
        "dtype": stream,
        "weight_dtype": cache,
    }
    yield p.gemm("o", part, h, q, model.o_bias)
    yield from p.reduce(part)
    if model.post_norms:
        yield p.move("post_norm", part, h, h, h, norm)


def _mlp(p: _Pass) -> Iterator[Row]:
    model, part, h, inner = p.model, Part.MLP, p.model.hidden, p.part.inner
    norm, bias = model.norm_parameters, model.mlp_bias
    share = (
        1 if model.parallel_residual else 2
    )  # streams the norm reads and writes: with the residual added, or without
    yield p.move("mlp_norm", part, h, share * h, share * h, norm)
    if model.gated and p.fuse_gate_up:
        yield p.gemm("gate_up", part, 2 * inner, h, bias)
    else:
        if model.gated:
            yield p.gemm("gate", part, inner, h, bias)
        yield p.gemm("up", part, inner, h, bias)
    yield p.move("activation", part, inner, (2 if model.gated else 1) * inner, inner)
    yield p.gemm("down", part, h, inner, bias)
    yield from p.reduce(part)
    if model.post_norms:
        yield p.move("post_norm", part, h, h, h, norm)
    if model.parallel_residual:
        yield p.move("residual", part, h, 2 * h, h)


def _pass_rows(p: _Pass) -> list[Row]:
    """Rows of one phase in the order they run; one attention row, for all layers."""
    model, stream, h, many = p.model, dtype_code(p.formats[3]), p.model.hidden, p.head_tokens
    tables = 2 if model.learned_positions else 1
    rows = [p.move("embedding", Part.EMBEDDING, h, tables * h, h, (p.part.vocab + model.learned_positions) * h)]
    rows += p.reduce(Part.EMBEDDING)
    layers = {"layer": 0, "layers": model.layers, "count": model.layers}
    rows += [row | layers for maker in (_attention, _mlp) for row in maker(p)]
    if model.final_norm:
        rows.append(p.move("final_norm", Part.HEAD, h, 2 * h, h, model.norm_parameters))
    head = {
        "role": "lm_head",
        "part": Part.HEAD,
        "m": many,
        "n": p.part.vocab,
        "k": h,
        "dtype": stream,
        "weight_dtype": stream,
    }
    rows.append(head | {"params": 0 if model.tied else p.part.vocab * h * p.owns})
    rows += [row | {"dtype": stream} for row in all_gather(p.part, many, DTYPE_BYTES[stream])]
    if model.logit_softcap:
        rows.append(p.move("softcap", Part.HEAD, model.vocab, model.vocab, model.vocab, tokens=many))
    return [row | {"phase": p.phase, "count": row.get("count", 1) * p.steps} for row in rows]


@lru_cache(maxsize=256)
def _lower(
    model: ModelConfig,
    phase: str,
    batch: int,
    seq: int,
    new_tokens: int,
    formats: tuple[str, str, str, str],
    fuse_qkv: bool,
    fuse_gate_up: bool,
    logits: str,
    devices: int,
    parallel: str,
) -> Workload:
    part = shard(model, devices, parallel)
    element = float(DTYPE_BYTES[dtype_code(formats[3])])
    rows: list[Row] = []
    spread: list[dict[str, Array]] = []  # attention rows of each phase
    if phase != "decode":
        many = batch if logits == "last" else batch * seq
        first = _Pass(model, part, Phase.PREFILL, batch, seq, seq, many, 1, True, formats, fuse_qkv, fuse_gate_up)
        rows += _pass_rows(first) + sends(devices, parallel, batch * seq, model.hidden, element)
        spread.append(_attention_columns(model.windows, np.array([seq])))
    if phase != "prefill":
        steps = new_tokens if phase == "generate" else 1
        last = _Pass(
            model,
            part,
            Phase.DECODE,
            batch,
            1,
            seq + 1,
            batch,
            steps,
            phase == "decode",
            formats,
            fuse_qkv,
            fuse_gate_up,
        )
        rows += _pass_rows(last)
        rows += [
            r | {"phase": Phase.DECODE, "count": r["count"] * steps}
            for r in sends(devices, parallel, batch, model.hidden, element)
        ]
        spread.append(_attention_columns(model.windows, seq + 1 + np.arange(steps)))
    how = parallel if devices > 1 else "none"
    meta = Meta(
        model.name, phase, batch, seq, new_tokens, formats[0], model.layers, model.hidden, devices, how, config=model
    )
    return _spread(rows, spread, meta)


def _attention_columns(windows: tuple[int, ...], kv_len: Array) -> dict[str, Array]:
    """Attention of all layers at each of the (rising) cache lengths: a row a length and run of layers with the same reach.

    A window that holds all keys is none, so layers differ only from the length on at which some window binds.
    """
    cuts = np.searchsorted(kv_len, sorted(set(windows) - {0}), side="right")
    pieces = []
    for lengths in np.split(kv_len, cuts):
        if not len(lengths):
            continue
        runs, start = [], 0
        for window, same in groupby(w if 0 < w < lengths[0] else 0 for w in windows):
            size = len(list(same))
            runs.append((start, size, window))
            start += size
        table = np.tile(np.array(runs), (len(lengths), 1))
        pieces.append(np.column_stack([table, np.repeat(lengths, len(runs))]))
    layer, layers, window, length = np.concatenate(pieces).T
    return {"layer": layer, "layers": layers, "count": layers, "window": window, "kv_len": length}


def _spread(rows: list[Row], spread: list[dict[str, Array]], meta: Meta) -> Workload:
    """The workload of rows whose attention rows, one a phase, stand for as many as ``spread`` says."""
    at = [i for i, row in enumerate(rows) if row["role"] == "attention"]
    if all(len(columns["layer"]) == 1 for columns in spread):
        for i, columns in zip(at, spread, strict=True):
            rows[i] = rows[i] | {name: column[0] for name, column in columns.items()}
        return Workload.from_rows(rows, meta)
    times = np.ones(len(rows), dtype=np.int64)
    times[at] = [len(columns["layer"]) for columns in spread]
    index = np.repeat(np.arange(len(rows)), times)
    wide = Workload.from_rows(rows, meta).take(index)
    new = {name: np.array(getattr(wide, name)) for name in spread[0]}
    for i, columns in zip(at, spread, strict=True):
        for name, column in columns.items():
            new[name][index == i] = column
    return wide.replace(**new)
