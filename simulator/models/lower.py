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
- Routed experts are one row a layer, all their kernels but the router's; shared experts are an MLP beside them.
- Latent attention: a prefill makes keys and values of the latent for every head; a decode attends to the latent itself,
  one weight's halves turning queries and outputs (``absorb_k``, ``absorb_v``), but where the cache is copied.
- Decode: each sequence adds one token to ``seq`` cached positions and attends to ``seq + 1``.
- Generate: an attention row a decode step; of thousands of steps, some neighbours are one row of their middle length.
- Serve: the steady state of continuous batching. In the time of one request every other one in flight is served too:
  a prefill each, one at a time, and ``new_tokens`` decode steps of all, whose caches are half grown on average.
"""

from __future__ import annotations

from functools import lru_cache
from itertools import groupby
from typing import Any

import numpy as np

from simulator.arguments import Range, instance, number, shown, text, whole
from simulator.arrays import Array
from simulator.engines import DEFAULT_ENGINE
from simulator.engines.engine import load_engine
from simulator.errors import InputError, unknown
from simulator.models.config import ModelConfig
from simulator.models.forward import Pass, Request
from simulator.models.parallel import shard
from simulator.routing import EXPERT_SKEW
from simulator.workload import DTYPE_BYTES, DTYPES, PHASES, Meta, Phase, Workload, dtype_code

MAX_TOKENS = 2**40
"""Largest batch x seq; beyond it counts would leave the exact range of float64."""

SKEW = Range(0.0, 2.0, "a number from 0 (experts used alike) to 2")
"""At 2 the busiest expert is used 40,000 times as often as the idlest."""

MAX_DECODES = 1_000_000
"""Largest number of decode steps."""

DECODE_LENGTHS = 1024
"""Below twice as many decode steps each has an attention row of its own; from there on neighbours share one. FLOPs and
bytes stay exact but where a window fills up; times move by less than 1e-4."""


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
    skew: float = EXPERT_SKEW,
) -> Workload:
    """Operators of one pass of a decoder, one row a shape; the same (immutable) object for the same arguments.
    InputError for what is unknown, out of range or cannot be split among the devices.

    Parameters
    ----------
    phase : {"prefill", "decode", "generate", "serve"}
        ``generate`` is a prefill of ``seq`` tokens and ``new_tokens`` decodes, ``serve`` what a request waits for where
        ``batch`` are in flight; parameters are on their prefill rows only.
    batch, seq : int
        Sequences; prompt tokens of each (prefill, generate) or cached positions (decode), also more than the model was
        trained for. At least 1.
    dtype, weight_dtype, kv_dtype : str
        Of arithmetic, of the projections' weights (default: as a checkpoint stores them, else ``dtype``), of the cache
        (default: the residual stream's).
    engine : str
        Name or path of an engine (:func:`simulator.list_engines`); "" for bare kernels, nothing fused.
    devices, parallel : int, {"tensor", "expert", "pipeline"}
        See :mod:`simulator.models.parallel`.
    skew : float, 0 to 2
        How unevenly tokens use routed experts (:func:`simulator.routing.experts_chance`): 0 alike.

    Examples
    --------
    >>> import simulator
    >>> w = lower(simulator.load_model("llama-2-7b"), phase="decode", batch=4, seq=1024, engine="vllm")
    >>> int(w.parameters), int(w.n[w.is_role("qkv")][0])
    (6738415616, 12288)
    """
    instance("model", model, ModelConfig, "load_model")
    checked = {"phase": (phase, PHASES), "dtype": (dtype, DTYPES)}
    for what, optional in (("weight_dtype", weight_dtype), ("kv_dtype", kv_dtype)):
        checked[what] = (dtype if optional is None else optional, DTYPES)
    for what, (value, choices) in checked.items():
        if not isinstance(value, str) or value not in choices:
            raise unknown(what, value, choices)
    batch, seq = _integer("batch", batch, 1, MAX_TOKENS), _integer("seq", seq, 1, MAX_TOKENS)
    if batch * seq > MAX_TOKENS:
        raise InputError(f"batch x seq: expected at most {MAX_TOKENS} tokens, got {batch * seq}")
    text("parallel", parallel)
    devices, low = _integer("devices", devices, 1, 1_000_000), int(phase in ("generate", "serve"))
    new_tokens = _integer("new_tokens", new_tokens, low, MAX_DECODES if low else 0, f" for phase {phase!r}")
    stream = stream_of(dtype)
    weights = weight_dtype or model.weight_dtype or dtype
    formats = [dtype_code(name) for name in (dtype, weights, kv_dtype or stream, stream)]
    runs = load_engine(engine)
    skew = number("skew", skew, SKEW)
    how = (runs.logits, runs.cache == "copied", devices, parallel, skew, "qkv" in runs.fuse, "gate_up" in runs.fuse)
    return _lower(Request(model, phase, batch, seq, new_tokens, engine, *how, *formats))


def stream_of(dtype: str) -> str:
    """Format of the residual stream, and of the cache unless told otherwise, where layers compute in a format.

    >>> stream_of("fp16"), stream_of("fp8")
    ('fp16', 'bf16')
    """
    return dtype if DTYPE_BYTES[dtype_code(dtype)] >= 2 else "bf16"


def _integer(what: str, value: Any, low: int, high: int, where: str = "") -> int:
    expected = f"{low}" if low == high else f"an integer from {low} to {high}"
    found = whole(value)
    if found is None or not low <= found <= high:
        raise InputError(f"{what}: expected {expected}{where}, got {shown(value)}")
    return found


@lru_cache(maxsize=256)
def _lower(r: Request) -> Workload:
    part, passes, lengths = shard(r.model, r.devices, r.parallel), [], []
    serve = r.phase == "serve"
    if r.phase != "decode":
        together, prompts = (1, r.batch) if serve else (r.batch, 1)
        passes.append(Pass(r, part, Phase.PREFILL, together, r.seq, prompts))
        lengths.append((np.array([r.seq]), np.array([prompts])))
    if r.phase != "prefill":
        steps = max(r.new_tokens, 1)
        passes.append(Pass(r, part, Phase.DECODE, r.batch, 1, steps))
        grown = (np.array([(steps + 1) // 2]), np.array([steps])) if serve else _decodes(steps)
        lengths.append((r.seq + grown[0], grown[1]))
    parallel = r.parallel if r.devices > 1 else "none"
    request = r.model.name, r.phase, r.batch, r.seq, r.new_tokens, DTYPES[r.dtype]
    meta = Meta(*request, r.model.layers, r.model.hidden, r.devices, parallel, r.engine, config=r.model)
    w = Workload.from_rows([row for one in passes for row in one.rows()], meta)
    rows = np.flatnonzero(w.is_role("attention"))
    if not len(rows):
        return w
    attending = [(first, many) for first, many, block in part.runs if block.heads]
    attention = [
        _attention_columns(r.model.windows[first : first + many], kv_len, executions, first)
        for kv_len, executions in lengths
        for first, many in attending
    ]
    times = np.ones(len(w), dtype=np.int64)
    times[rows] = [columns.shape[1] for columns in attention]
    w = w.take(np.repeat(np.arange(len(w)), times))
    rows = w.is_role("attention")
    columns = {name: getattr(w, name).copy() for name in ("layer", "layers", "window", "kv_len", "count")}
    for column, values in zip(columns.values(), np.hstack(attention)):
        column[rows] = values
    return w.replace(**columns)


def _decodes(steps: int) -> tuple[Array, Array]:
    """Positions that the decodes of a request have added, and how many decodes each number stands for.

    The first steps and the last are alone: what is pruned follows from the one, the memory of the cache from the other.

    >>> lengths, executions = _decodes(1_000_000)
    >>> len(lengths), lengths[[0, -1]].tolist(), int(executions.sum()), int(lengths @ executions) * 2
    (1552, [1, 1000000], 1000000, 1000001000000)
    """
    size = steps // (2 * DECODE_LENGTHS) * 2 + 1  # odd, so that the middle one stands for all
    shared = max(steps - 2, 0) // size
    alone = steps - 1 - size * shared
    middle = alone + size * np.arange(shared) + (size + 1) // 2
    executions = np.repeat([1, size, 1], [alone, shared, 1])
    return np.concatenate([1 + np.arange(alone), middle, [steps]]), executions


def _attention_columns(windows: tuple[int, ...], kv_len: Array, times: Array, first: int) -> Array:
    """Attention of consecutive layers from ``first`` on at each of the (rising) cache lengths, ``times`` at each: a
    column a length and run of equal layers.

    Its rows: first layer, layers, window, length, executions. A window that holds all keys is none, so layers differ
    only from the length on at which some window binds.
    """
    cuts = np.searchsorted(kv_len, sorted(set(windows) - {0}), side="right")
    pieces = []
    for lengths, many in zip(np.split(kv_len, cuts), np.split(times, cuts)):
        if not len(lengths):
            continue
        runs, start = [], first
        for window, same in groupby(w if 0 < w < lengths[0] else 0 for w in windows):
            size = len(list(same))
            runs.append((start, size, window))
            start += size
        each = np.repeat(np.stack([lengths, many]), len(runs), axis=1)
        pieces.append(np.vstack([np.tile(np.array(runs).T, len(lengths)), each]))
    out = np.hstack(pieces)
    return np.vstack([out[:-1], out[1] * out[-1]])
