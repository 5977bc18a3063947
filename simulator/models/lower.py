"""Lowering: a decoder's shapes and a request become the table of operators an inference engine runs.

Use :func:`lower`. Which projections are one GEMM, and which positions go through the head, the engine says. What rows
assume, and why:

- Engine-like fusion: a residual addition is part of the norm that follows it, so ``attention_norm`` and ``mlp_norm``
  read the stream and the last sublayer's output and write the sum and its norm (2 + 2 tensors). The first layer's norm
  is counted alike, though it has nothing to add. Where attention and MLP run on the same input (GPT-NeoX), ``mlp_norm``
  only normalises and one ``residual`` row adds both outputs.
- Scaling of the embedding, soft-capping of attention, biases and quantisation of activations are fused into their
  neighbours: no rows, no bytes.
- Bytes of token ids, norm weights and rotary tables are left out (below 0.1 % of any pass). Sampling is not part of it.
- ``dtype`` is what the layers' GEMMs compute in. With an 8- or 4-bit one, the residual stream, attention, embedding and
  head stay in bf16. ``weight_dtype`` is that of the layers' projections alone: quantised checkpoints keep embedding and
  head in 16 bits.
- A cache that is copied (Transformers): each decode step reads and writes all of it, and where query heads share keys,
  again for every query head, which attention then reads; the row ``cache_write`` has these bytes.
- Decode: each sequence adds one token to ``seq`` cached positions and attends to ``seq + 1``.
- Serve: the steady state of continuous batching. In the time of one request every other one in flight is served too:
  a prefill each, one at a time, and ``new_tokens`` decode steps of all, whose caches are half grown on average.
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
from simulator.engines import DEFAULT_ENGINE
from simulator.engines.engine import load_engine
from simulator.errors import InputError, unknown
from simulator.models.config import ModelConfig
from simulator.models.parallel import shard
from simulator.workload import DTYPE_BYTES, DTYPES, PHASES, Kind, Meta, Part, Phase, Workload, dtype_code

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
    engine: str = DEFAULT_ENGINE,
    devices: int = 1,
    parallel: str = "tensor",
) -> Workload:
    """Operators of one pass of a decoder, one row a shape; the same (immutable) object for the same arguments.

    Parameters
    ----------
    phase : {"prefill", "decode", "generate", "serve"}
        ``generate`` is a prefill of ``seq`` tokens and ``new_tokens`` decodes, ``serve`` what a request waits for where
        ``batch`` are in flight; parameters are on their prefill rows only.
    batch, seq : int
        Sequences; prompt tokens of each (prefill, generate) or cached positions (decode), also more than the model was
        trained for. At least 1.
    dtype, weight_dtype, kv_dtype : str
        Of arithmetic, of the projections' weights (default ``dtype``), of the cache (default: the residual stream's).
    engine : str
        Name or path of an engine (:func:`simulator.list_engines`); "" for bare kernels, nothing fused.
    devices, parallel : int, {"tensor", "pipeline"}
        See :mod:`simulator.models.parallel`.

    Examples
    --------
    >>> import simulator
    >>> w = lower(simulator.load_model("llama-2-7b"), phase="decode", batch=4, seq=1024, engine="vllm")
    >>> int(w.parameters), int(w.n[w.is_role("qkv")][0])
    (6738415616, 12288)
    """
    if not isinstance(model, ModelConfig):
        raise InputError(f"model: expected a ModelConfig (see load_model), got {type(model).__name__}")
    checked = {"phase": (phase, PHASES), "dtype": (dtype, DTYPES)}
    for what, optional in (("weight_dtype", weight_dtype), ("kv_dtype", kv_dtype)):
        checked[what] = (dtype if optional is None else optional, DTYPES)
    for what, (value, choices) in checked.items():
        if not isinstance(value, str) or value not in choices:
            raise unknown(what, value, choices)
    batch, seq = _integer("batch", batch, 1, MAX_TOKENS), _integer("seq", seq, 1, MAX_TOKENS)
    if batch * seq > MAX_TOKENS:
        raise InputError(f"batch x seq: expected at most {MAX_TOKENS} tokens, got {batch * seq}")
    devices, low = _integer("devices", devices, 1, 1_000_000), int(phase in ("generate", "serve"))
    new_tokens = _integer("new_tokens", new_tokens, low, MAX_DECODES if low else 0, f" for phase {phase!r}")
    stream = dtype if DTYPE_BYTES[dtype_code(dtype)] >= 2 else "bf16"
    formats = [dtype_code(name) for name in (dtype, weight_dtype or dtype, kv_dtype or stream, stream)]
    runs = load_engine(engine)
    how = runs.logits, runs.cache == "copied", devices, parallel, "qkv" in runs.fuse, "gate_up" in runs.fuse
    return _lower(_Request(model, phase, batch, seq, new_tokens, engine, *how, *formats))


def _integer(what: str, value: Any, low: int, high: int, where: str = "") -> int:
    expected = f"{low}" if low == high else f"an integer from {low} to {high}"
    try:
        number = operator.index(value)
    except TypeError:
        number = low - 1
    if isinstance(value, bool) or not low <= number <= high:
        raise InputError(f"{what}: expected {expected}{where}, got {value!r}")
    return number


@dataclass(frozen=True)
class _Request:
    """The arguments of :func:`lower`, checked; formats as codes."""

    model: ModelConfig
    phase: str
    batch: int
    seq: int
    new_tokens: int
    engine: str
    logits: str
    copies: bool
    devices: int
    parallel: str
    fuse_qkv: bool
    fuse_gate_up: bool
    dtype: int
    weight_dtype: int
    cache_dtype: int
    stream_dtype: int

    @property
    def split(self) -> bool:
        """Whether several devices share each layer."""
        return self.devices > 1 and self.parallel == "tensor"


@dataclass(frozen=True)
class _Pass:
    """One prefill, or the decodes of a request, as rows in the order they run; one attention row for all layers."""

    request: _Request
    part: ModelConfig  # what one device computes
    phase: Phase
    batch: int  # sequences
    q_len: int
    steps: int  # executions

    @property
    def tokens(self) -> int:
        return self.batch * self.q_len

    @property
    def mean_length(self) -> float:
        """Positions that a decode step finds and adds, on average over the steps."""
        return self.request.seq + (self.steps + 1) / 2

    @property
    def head_tokens(self) -> int:
        """Positions that go through the head."""
        return self.tokens if self.request.logits == "all" else self.batch

    @property
    def owns(self) -> float:
        """Share of the parameters that each execution of its rows carries."""
        return (self.phase == Phase.PREFILL or self.request.phase == "decode") / self.steps

    def rows(self) -> list[Row]:
        model, vocab, many, h = self.part, self.part.vocab, self.head_tokens, self.part.hidden
        tables = 2 if model.learned_positions else 1
        rows = [self.move("embedding", Part.EMBEDDING, h, tables * h, h, (vocab + model.learned_positions) * h)]
        rows += self.collective("all_reduce", Part.EMBEDDING, self.tokens, h)
        layers = {"layer": 0, "layers": model.layers, "count": model.layers}
        rows += [row | layers for row in (*self.attention(), *self.mlp())]
        if model.final_norm:
            rows.append(self.move("final_norm", Part.HEAD, h, 2 * h, h, model.norm_parameters))
        stream = {"dtype": self.request.stream_dtype, "weight_dtype": self.request.stream_dtype}
        head = self.gemm("lm_head", Part.HEAD, vocab, h, False) | stream | {"m": many}
        rows.append(head | {"params": 0 if model.tied else head["params"]})
        rows += self.collective("all_gather", Part.HEAD, many, self.request.model.vocab)
        if model.logit_softcap:
            whole = self.request.model.vocab
            rows.append(self.move("softcap", Part.HEAD, whole, whole, whole, tokens=many))
        rows += self.sends()
        return [row | {"phase": self.phase, "count": row.get("count", 1) * self.steps} for row in rows]

    def attention(self) -> Iterator[Row]:
        r, model, part, h, d = self.request, self.part, Part.ATTENTION, self.part.hidden, self.part.head_dim
        q, kv, norm = model.q_width, model.kv_width, model.norm_parameters
        yield self.move("attention_norm", part, h, 2 * h, 2 * h, norm)
        for role, n in (("qkv", q + 2 * kv),) if r.fuse_qkv else (("q", q), ("k", kv), ("v", kv)):
            yield self.gemm(role, part, n, h, model.qkv_bias)
        if model.qk_norm:
            yield self.move("qk_norm", part, q + kv, q + kv, q + kv, 2 * d)
        if model.rotary_dim:
            turned = (model.heads + model.kv_heads) * model.rotary_dim
            yield self.move("rotary", part, turned, turned, turned)
        read, write = 2.0 * kv, 2.0 * kv * float(DTYPE_BYTES[r.cache_dtype] / DTYPE_BYTES[r.stream_dtype])
        if (
            r.copies and self.phase == Phase.DECODE
        ):  # one tensor of old and new, then one of a head for every query head
            repeats = model.heads // model.kv_heads if model.heads > model.kv_heads else 0
            copied = self.mean_length * (1 + repeats)
            read, write = read + write * (copied + (repeats and self.mean_length)), write * copied
        kept = {"kv_len": int(self.mean_length)} if r.copies and self.phase == Phase.DECODE else {}
        yield self.move("cache_write", part, 2 * kv, read, write) | {"weight_dtype": r.cache_dtype, **kept}
        kind = Kind.DECODE_ATTENTION if self.phase == Phase.DECODE else Kind.PREFILL_ATTENTION
        row = {"kind": kind, "role": "attention", "part": part, "dtype": r.stream_dtype, "weight_dtype": r.cache_dtype}
        heads = {"heads": model.heads, "kv_heads": model.kv_heads, "head_dim": d}
        yield row | heads | {"batch": self.batch, "q_len": self.q_len}
        yield self.gemm("o", part, h, q, model.o_bias)
        yield from self.collective("all_reduce", part, self.tokens, h)
        if model.post_norms:
            yield self.move("post_norm", part, h, h, h, norm)

    def mlp(self) -> Iterator[Row]:
        model, part, h, inner = self.part, Part.MLP, self.part.hidden, self.part.inner
        norm, bias = model.norm_parameters, model.mlp_bias
        moved = h if model.parallel_residual else 2 * h  # the norm adds the residual, or does not
        yield self.move("mlp_norm", part, h, moved, moved, norm)
        if model.gated and self.request.fuse_gate_up:
            yield self.gemm("gate_up", part, 2 * inner, h, bias)
        else:
            if model.gated:
                yield self.gemm("gate", part, inner, h, bias)
            yield self.gemm("up", part, inner, h, bias)
        yield self.move("activation", part, inner, (2 if model.gated else 1) * inner, inner)
        yield self.gemm("down", part, h, inner, bias)
        yield from self.collective("all_reduce", part, self.tokens, h)
        if model.post_norms:
            yield self.move("post_norm", part, h, h, h, norm)
        if model.parallel_residual:
            yield self.move("residual", part, h, 2 * h, h)

    def gemm(self, role: str, part: Part, n: int, k: int, bias: bool) -> Row:
        formats = {"dtype": self.request.dtype, "weight_dtype": self.request.weight_dtype}
        params = (n * k + bias * n) * self.owns
        return {"role": role, "part": part, "m": self.tokens, "n": n, "k": k, "params": params, **formats}

    def move(self, role: str, part: Part, n: int, read: float, write: float, params: int = 0, tokens: int = 0) -> Row:
        """An elementwise row over ``tokens`` positions of ``n`` features; reads and writes in elements a position."""
        stream, tokens = self.request.stream_dtype, tokens or self.tokens
        size = float(tokens * DTYPE_BYTES[stream])
        row = {"kind": Kind.ELEMENTWISE, "role": role, "part": part, "m": tokens, "n": n, "params": params * self.owns}
        return row | {"read_bytes": size * read, "write_bytes": size * write, "dtype": stream, "weight_dtype": stream}

    def collective(self, role: str, part: Part, tokens: int, width: int) -> list[Row]:
        """What the devices put together: [tokens, width], the payload; nothing on one device."""
        if not self.request.split:
            return []
        stream = self.request.stream_dtype
        row = {"kind": Kind.COLLECTIVE, "role": role, "part": part, "m": tokens, "n": width, "dtype": stream}
        return [row | {"batch": self.request.devices, "read_bytes": tokens * width * DTYPE_BYTES[stream]}]

    def sends(self) -> list[Row]:
        """A pipeline's sends of the residual stream, each between two devices; they remain when layers are pruned."""
        r = self.request
        if r.devices == 1 or r.split:
            return []
        payload = self.tokens * r.model.hidden * float(DTYPE_BYTES[r.stream_dtype])
        row = {"kind": Kind.COLLECTIVE, "role": "send", "part": Part.HEAD, "m": self.tokens, "n": r.model.hidden}
        return [row | {"batch": 2, "read_bytes": payload, "count": r.devices - 1}]


@lru_cache(maxsize=256)
def _lower(r: _Request) -> Workload:
    part, passes, lengths = shard(r.model, r.devices, r.parallel), [], []
    serve = r.phase == "serve"
    if r.phase != "decode":
        together, prompts = (1, r.batch) if serve else (r.batch, 1)
        passes.append(_Pass(r, part, Phase.PREFILL, together, r.seq, prompts))
        lengths.append(np.array([r.seq]))
    if r.phase != "prefill":
        steps = max(r.new_tokens, 1)
        passes.append(_Pass(r, part, Phase.DECODE, r.batch, 1, steps))
        lengths.append(np.array([r.seq + (steps + 1) // 2]) if serve else r.seq + 1 + np.arange(steps))
    parallel = r.parallel if r.devices > 1 else "none"
    request = r.model.name, r.phase, r.batch, r.seq, r.new_tokens, DTYPES[r.dtype]
    meta = Meta(*request, r.model.layers, r.model.hidden, r.devices, parallel, r.engine, config=r.model)
    w = Workload.from_rows([row for one in passes for row in one.rows()], meta)
    attention = [_attention_columns(r.model.windows, kv_len) for kv_len in lengths]
    times = np.ones(len(w), dtype=np.int64)
    times[w.is_role("attention")] = [columns.shape[1] for columns in attention]
    w = w.take(np.repeat(np.arange(len(w)), times))
    rows, (layer, layers, window, kv_len) = w.is_role("attention"), np.hstack(attention)
    each = [one.steps // len(kv_len) for one, kv_len in zip(passes, lengths)]  # executions at each length
    executed = layers * np.repeat(each, [columns.shape[1] for columns in attention])
    new = {"layer": layer, "layers": layers, "count": executed, "window": window, "kv_len": kv_len}
    columns = {name: getattr(w, name).copy() for name in new}
    for name, values in new.items():
        columns[name][rows] = values
    return w.replace(**columns)


def _attention_columns(windows: tuple[int, ...], kv_len: Array) -> Array:
    """Attention of all layers at each of the (rising) cache lengths: a column a length and run of equal layers.

    Its rows: first layer, layers, window, length. A window that holds all keys is none, so layers differ only from the
    length on at which some window binds.
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
        pieces.append(np.vstack([np.tile(np.array(runs).T, len(lengths)), np.repeat(lengths, len(runs))]))
    return np.hstack(pieces)
