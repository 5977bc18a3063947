"""Lower a decoder and a request to the table of operators that an inference engine runs: :func:`lower`.

The engine determines which projections are one GEMM, and which positions the head computes. Assumptions of the rows:

- Residual additions are fused into the norm that follows. ``attention_norm`` and ``mlp_norm`` read the residual stream
  and the output of the previous sublayer, and write the sum and its norm (2 + 2 tensors). The first layer's norm counts
  the same, though it adds nothing. If attention and MLP read the same input (GPT-NeoX), ``mlp_norm`` only normalises,
  and one ``residual`` row adds both outputs.
- Scaling of the embedding, soft-capping of attention and biases are fused: no rows, no bytes.
- Products in a format below 16 bits read activations in that format. The kernel before them writes it, or a kernel of
  its own converts it (``quantize``), as the engine's file states. Latent vectors are converted with their norm.
- Bytes of token ids, norm weights and rotary tables are excluded (below 0.1 % of any pass), and so is sampling.
- ``dtype`` is the format in which the GEMMs of the layers compute. With 8 or 4 bits, the residual stream, attention,
  embedding and head stay in bf16. ``weight_dtype`` applies only to the projections of the layers: quantised checkpoints
  keep embedding and head in 16 bits.
- If the cache is copied (Transformers), each decode step reads and writes all of it, and once more for every query head
  if query heads share keys. Attention reads that copy; the row ``cache_write`` has these bytes.
- Routed experts are one row per layer, with all their kernels except the router. Shared experts are an MLP.
- Latent attention: a prefill computes keys and values of every head. A decode step attends to the latent vector; the
  halves of one weight transform queries and outputs (``absorb_k``, ``absorb_v``), unless the cache is copied.
- Decode: each sequence adds one token to ``seq`` cached positions and attends to ``seq + 1``.
- Generate: one attention row per decode step; for thousands of steps, neighbours share one row of their middle length.
- Prefill in an engine with a token budget: a pass holds as many whole prompts as the budget, at least one. A longer
  prompt is computed in chunks, each of which attends to the earlier ones, if the engine has them.
- Prefix caching: the first tokens of each prompt are in the cache; a prefill computes and writes only the others.
- Serve: the steady state of continuous batching. During one request every other request in flight is served too: one
  prefill each, and ``new_tokens`` decode steps of all requests, whose caches are half grown on average. Prompts that
  arrive during one decode step, ``batch / new_tokens``, are computed in one pass; short ones of neighbouring steps too
  (``Schedule.clustered``). A pass has at least one prompt, and at most the budget.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import lru_cache
from itertools import groupby
from typing import Any

import numpy as np

from simulator.arrays import Array
from simulator.codes import DTYPE_BYTES, Phase, dtype_code
from simulator.engines.engine import Engine, Schedule, load_engine
from simulator.errors import InputError
from simulator.models.config import ModelConfig, shard
from simulator.models.forward import Lowering, PassRows
from simulator.models.library import load_model
from simulator.operators.experts import EXPERT_SKEW
from simulator.request import SETTINGS, Lowered, Request
from simulator.workload import Workload

# prompts always get at least 1 / LEAST_PROMPTS of the token budget, as servers limit the number of decoding sequences
LEAST_PROMPTS = 4
# up to twice this number of decode steps, each step has its own attention row; beyond, neighbours share one: FLOPs and
# bytes stay exact except where a window fills up; times change by less than 1e-4
DECODE_LENGTHS = 1024


def lower(model: str | ModelConfig | Request, **settings: Any) -> Workload:
    """Return the operators of one decoder pass, one row per shape; equal requests return the same object.

    Parameters
    ----------
    model : str or ModelConfig
        Model: a name or a path, or shapes from :func:`simulator.load_model`. A :class:`simulator.Request` states the
        settings too.
    **settings
        Fields of :class:`simulator.Request`, such as ``phase``, ``batch``, ``seq`` and ``engine`` ("": bare kernels
        without fusion). Without a ``token_budget``, that of the engine on GPUs of much memory counts
        (:class:`simulator.engines.schedule.Schedule`); engines without a schedule compute all prompts in one pass.

    Returns
    -------
    Workload
        Operators of the pass on one device, or of all stages of a pipeline. Parameters are counted in the prefill rows
        only.

    Raises
    ------
    InputError
        If a setting is unknown or out of range, or the model cannot be split over the devices.

    Examples
    --------
    >>> import simulator
    >>> w = simulator.lower("llama-2-7b", phase="decode", batch=4, seq=1024, engine="vllm")
    >>> int(w.parameters), int(w.n[w.is_role("qkv")][0])
    (6738415616, 12288)
    """
    request = replace(model, **settings) if isinstance(model, Request) else Request(model=model, **settings)
    # the level and a measured time change no operator
    request = replace(request, model=load_model(request.model), level=0.9, dense_s=None, ideal=False)
    return _lower(request, load_engine(request.engine))


def stream_of(dtype: str) -> str:
    """Return the format of the residual stream, and the default of the cache, if layers compute in ``dtype``."""
    return dtype if DTYPE_BYTES[dtype_code(dtype)] >= 2 else "bf16"


def cached_tokens(request: Request) -> int:
    """Return the tokens of each prompt that the prefix cache holds; InputError if no token is left to compute."""
    prefix, seq = request.cached_prefix, request.seq
    if request.phase == "decode":
        return 0
    tokens = int(prefix * seq) if prefix < 1.0 else int(prefix)
    if tokens >= seq or (prefix >= 1.0 and tokens != prefix):
        expected = f"expected whole tokens below the {seq} of the prompt, or a share below 1"
        raise InputError(f"cached_prefix: {expected}, got {prefix:g}")
    return tokens


def _budget(request: Request, schedule: Schedule | None) -> int:
    budget = request.token_budget or (schedule.limits[-1].tokens if schedule else 0)
    if schedule is not None and schedule.decodes_count and request.phase == "serve":
        return max(budget - request.batch, budget // LEAST_PROMPTS)
    return budget


@lru_cache(maxsize=256)
def _lower(request: Request, engine: Engine) -> Workload:
    model, several = request.model, request.devices > 1
    weight, stream = request.weight_dtype or model.weight_dtype or request.dtype, stream_of(request.dtype)
    runs_sparse24 = not request.engine or engine.sparse24_kernels(request.dtype, weight) is not None
    resolved = {
        "new_tokens": request.new_tokens if request.phase in ("generate", "serve") else 0,
        "cached_prefix": cached_tokens(request),
        "token_budget": _budget(request, engine.schedule),
        "parallel": request.parallel if several else "none",
        "link": (request.link or "") if several else "",
        "skew": EXPERT_SKEW if request.skew is None else request.skew,
    }
    shapes = {"model": model.name, "layers": model.layers, "hidden": model.hidden, "config": model}
    meta = Lowered(**{**{name: getattr(request, name) for name in SETTINGS}, **resolved, **shapes})
    r = Lowering(
        request=meta,
        model=model,
        engine=engine,
        sparse24=model.sparse24 or (model.declared == "2:4" and runs_sparse24),
        dtype=dtype_code(request.dtype),
        weight_dtype=dtype_code(weight),
        cache_dtype=dtype_code(request.kv_dtype or stream),
        stream_dtype=dtype_code(stream),
    )
    part = shard(model, request.devices, request.parallel)
    passes: list[PassRows] = []
    lengths: list[tuple[Array, Array]] = []
    if meta.phase != "decode":
        for prompts, tokens, past, chunks, each in _prefills(meta, engine.schedule):
            passes.append(PassRows(r, part, Phase.PREFILL, prompts, tokens, chunks * each, first=not passes))
            done, runs = _steps(chunks)
            lengths.append((past + tokens * done, runs * each))
    if meta.phase != "prefill":
        steps = max(meta.new_tokens, 1)
        passes.append(PassRows(r, part, Phase.DECODE, meta.batch, 1, steps))
        grown = (np.array([(steps + 1) // 2]), np.array([steps])) if meta.phase == "serve" else _steps(steps)
        lengths.append((meta.seq + grown[0], grown[1]))
    w = Workload.computed([row for one in passes for row in one.rows()], meta)
    rows = np.flatnonzero(w.is_role("attention"))
    if not len(rows):
        return w
    attending = [(first, many) for first, many, block in part.runs if block.heads and not block.delta]
    attention = [
        _attention_columns(model.windows[first : first + many], kv_len, executions, first)
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


def _prefills(r: Lowered, schedule: Schedule | None) -> Iterator[tuple[int, int, int, int, float]]:
    """Yield kinds of prefill passes: prompts, tokens of each, positions before them, chunks in a row, executions."""
    cached, limit = int(r.cached_prefix), r.token_budget or 0
    tokens = r.seq - cached
    budget = limit or r.batch * tokens
    if schedule is not None and schedule.chunked and tokens > budget:
        chunks, rest = divmod(tokens, budget)
        yield 1, budget, cached, chunks, r.batch
        if rest:
            yield 1, rest, r.seq - rest, 1, r.batch
        return
    together = min(r.batch, max(budget // tokens, 1))
    if r.phase == "serve":
        arriving = round(r.batch / r.new_tokens) if limit else 1  # without a server one after the other
        clustered = schedule.clustered if schedule else 0
        together = min(together, max(arriving, clustered // tokens, 1))
        yield together, tokens, cached, 1, r.batch / together
        return
    full, rest = divmod(r.batch, together)
    yield together, tokens, cached, 1, full
    if rest:
        yield rest, tokens, cached, 1, 1


def _steps(steps: int) -> tuple[Array, Array]:
    """Return numbers of steps (decode steps, chunks of a prompt) that are done after a step, and how many steps each
    number represents. Pruning depends on the first steps, cache memory on the last: these represent only themselves."""
    size = steps // (2 * DECODE_LENGTHS) * 2 + 1  # odd, so the middle step represents all
    shared = max(steps - 2, 0) // size
    alone = steps - 1 - size * shared
    middle = alone + size * np.arange(shared) + (size + 1) // 2
    executions = np.repeat([1, size, 1], [alone, shared, 1])
    return np.concatenate([1 + np.arange(alone), middle, [steps]]), executions


def _attention_columns(windows: tuple[int, ...], kv_len: Array, times: Array, first: int) -> Array:
    """Return attention of consecutive layers from ``first`` at rising cache lengths, with ``times`` executions each.
    A column is a length and a run of equal layers; rows are first layer, layers, window, length and executions.

    A window longer than the cache has no effect, so layers differ only from some length on."""
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
