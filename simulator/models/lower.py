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
from functools import lru_cache
from itertools import groupby
from typing import Any

import numpy as np

from simulator.arguments import Range, number, shown, text, whole
from simulator.arrays import Array
from simulator.codes import DTYPE_BYTES, DTYPES, PHASES, Phase, dtype_code
from simulator.engines import DEFAULT_ENGINE
from simulator.engines.engine import load_engine
from simulator.errors import InputError, unknown
from simulator.models.config import ModelConfig, shard
from simulator.models.forward import PassRows, Request
from simulator.models.library import load_model
from simulator.operators.experts import EXPERT_SKEW
from simulator.request import Meta
from simulator.workload import Workload

MAX_TOKENS = 2**40  # largest batch x seq; larger counts would not be exact in float64
# at 2 the busiest expert has 40,000 times the load of the least busy
SKEW = Range(0.0, 2.0, "a number from 0 (equal use of experts) to 2")
_PREFIX = Range(0.0, float(MAX_TOKENS), "tokens, or a share of the prompt below 1")
# prompts always get at least 1 / LEAST_PROMPTS of the token budget, as servers limit the number of decoding sequences
LEAST_PROMPTS = 4
MAX_DECODES = 1_000_000  # largest number of decode steps
# up to twice this number of decode steps, each step has its own attention row; beyond, neighbours share one: FLOPs and
# bytes stay exact except where a window fills up; times change by less than 1e-4
DECODE_LENGTHS = 1024


def lower(
    model: str | ModelConfig,
    *,
    phase: str = "decode",
    batch: int = 1,
    seq: int = 2048,
    new_tokens: int = 0,
    dtype: str = "bf16",
    weight_dtype: str | None = None,
    kv_dtype: str | None = None,
    engine: str = DEFAULT_ENGINE,
    devices: int = 1,
    parallel: str = "tensor",
    link: str | None = None,
    skew: float = EXPERT_SKEW,
    token_budget: int | None = None,
    cached_prefix: float = 0,
) -> Workload:
    """Return the operators of one decoder pass, one row per shape; equal arguments return the same object.

    Parameters
    ----------
    model : str or ModelConfig
        Model: a name or a path, or shapes from :func:`simulator.load_model`.
    phase : {"prefill", "decode", "generate", "serve"}
        ``generate`` is a prefill of ``seq`` tokens and ``new_tokens`` decode steps. ``serve`` is the work during one
        request if ``batch`` requests are in flight. Parameters are counted in the prefill rows only.
    batch : int
        Sequences, or requests in flight; at least 1.
    seq : int
        Prompt tokens per sequence, or cached positions in ``decode``; at least 1. It may exceed the length that the
        model was trained for.
    new_tokens : int
        Decode steps of ``generate`` and ``serve``, 1 to 1,000,000; 0 in other phases.
    dtype : str
        Number format of the arithmetic, one of ``simulator.codes.DTYPES``.
    weight_dtype : str, optional
        Number format of the projections. Default: that of the checkpoint, else ``dtype``.
    kv_dtype : str, optional
        Number format of the K/V cache. Default: that of the residual stream.
    engine : str
        Name or path of an engine (:func:`simulator.list_engines`); "" for bare kernels without fusion.
    devices : int
        Number of devices, at least 1.
    parallel : {"tensor", "expert", "pipeline"}
        How devices share the model, see :mod:`simulator.models.config`.
    link : str, optional
        What joins the devices, of :data:`simulator.hardware.link.CONNECTIONS`. Default: the hardware's usual
        connection.
    skew : float
        Imbalance of routed experts, 0 (equal use) to 2, see :func:`simulator.operators.experts.experts_chance`.
    token_budget : int, optional
        Most prompt and decode tokens of one step, at least 1. Default: the engine's on GPUs of much memory
        (:class:`simulator.engines.schedule.Schedule`); engines without a schedule compute all prompts in one pass.
    cached_prefix : float
        Tokens of each prompt that the prefix cache holds, below ``seq``, or a share of the prompt in [0, 1). No effect
        on ``decode``.

    Returns
    -------
    Workload
        Operators of the pass on one device, or of all stages of a pipeline.

    Raises
    ------
    InputError
        If an argument is unknown or out of range, or the model cannot be split over the devices.

    Examples
    --------
    >>> import simulator
    >>> w = simulator.lower("llama-2-7b", phase="decode", batch=4, seq=1024, engine="vllm")
    >>> int(w.parameters), int(w.n[w.is_role("qkv")][0])
    (6738415616, 12288)
    """
    model = load_model(model)
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
    runs = load_engine(engine)
    schedule = runs.schedule
    weight = weight_dtype or model.weight_dtype or dtype
    runs_sparse24 = not engine or runs.sparse24_kernels(dtype, weight) is not None
    budget = 0 if schedule is None else schedule.limits[-1].tokens
    if token_budget is not None:
        budget = _integer("token_budget", token_budget, 1, MAX_TOKENS)
    if schedule is not None and schedule.decodes_count and phase == "serve":
        budget = max(budget - batch, budget // LEAST_PROMPTS)
    request = Request(
        model=model,
        phase=phase,
        batch=batch,
        seq=seq,
        new_tokens=new_tokens,
        cached=0 if phase == "decode" else cached_tokens(cached_prefix, seq),
        budget=budget,
        clustered=0 if schedule is None else schedule.clustered,
        chunked=schedule is not None and schedule.chunked,
        engine=engine,
        logits=runs.logits,
        copies=runs.cache == "copied",
        devices=devices,
        parallel=parallel,
        link="" if link is None else text("link", link),
        skew=number("skew", skew, SKEW),
        fuse_qkv="qkv" in runs.fuse,
        fuse_gate_up="gate_up" in runs.fuse,
        quantize=runs.quantize.inputs if DTYPE_BYTES[dtype_code(dtype)] < 2.0 else (),
        sparse24=model.sparse24 or (model.declared == "2:4" and runs_sparse24),
        dtype=dtype_code(dtype),
        weight_dtype=dtype_code(weight),
        cache_dtype=dtype_code(kv_dtype or stream_of(dtype)),
        stream_dtype=dtype_code(stream_of(dtype)),
    )
    return _lower(request)


def stream_of(dtype: str) -> str:
    """Return the format of the residual stream, and the default of the cache, if layers compute in ``dtype``."""
    return dtype if DTYPE_BYTES[dtype_code(dtype)] >= 2 else "bf16"


def cached_tokens(prefix: float, seq: int) -> int:
    """Return the tokens of a prompt of ``seq`` tokens that a prefix cache holds; ``prefix`` is tokens, or a share below
    1. InputError if no token is left to compute."""
    prefix = number("cached_prefix", prefix, _PREFIX)
    tokens = int(prefix * seq) if prefix < 1.0 else int(prefix)
    if tokens >= seq or (prefix >= 1.0 and tokens != prefix):
        raise InputError(
            f"cached_prefix: expected whole tokens below the {seq} of the prompt, or a share below 1, got {prefix:g}"
        )
    return tokens


def _integer(what: str, value: Any, low: int, high: int, where: str = "") -> int:
    expected = f"{low}" if low == high else f"an integer from {low} to {high}"
    found = whole(value)
    if found is None or not low <= found <= high:
        raise InputError(f"{what}: expected {expected}{where}, got {shown(value)}")
    return found


@lru_cache(maxsize=256)
def _lower(r: Request) -> Workload:
    part = shard(r.model, r.devices, r.parallel)
    passes: list[PassRows] = []
    lengths: list[tuple[Array, Array]] = []
    serve = r.phase == "serve"
    if r.phase != "decode":
        for prompts, tokens, past, chunks, each in _prefills(r):
            passes.append(PassRows(r, part, Phase.PREFILL, prompts, tokens, chunks * each, first=not passes))
            done, runs = _steps(chunks)
            lengths.append((past + tokens * done, runs * each))
    if r.phase != "prefill":
        steps = max(r.new_tokens, 1)
        passes.append(PassRows(r, part, Phase.DECODE, r.batch, 1, steps))
        grown = (np.array([(steps + 1) // 2]), np.array([steps])) if serve else _steps(steps)
        lengths.append((r.seq + grown[0], grown[1]))
    meta = Meta(
        model=r.model.name,
        phase=r.phase,
        batch=r.batch,
        seq=r.seq,
        new_tokens=r.new_tokens,
        cached=r.cached,
        budget=r.budget,
        dtype=DTYPES[r.dtype],
        layers=r.model.layers,
        hidden=r.model.hidden,
        devices=r.devices,
        parallel=r.parallel if r.devices > 1 else "none",
        link=r.link if r.devices > 1 else "",
        engine=r.engine,
        config=r.model,
    )
    w = Workload.computed([row for one in passes for row in one.rows()], meta)
    rows = np.flatnonzero(w.is_role("attention"))
    if not len(rows):
        return w
    attending = [(first, many) for first, many, block in part.runs if block.heads and not block.delta]
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


def _prefills(r: Request) -> Iterator[tuple[int, int, int, int, float]]:
    """Yield kinds of prefill passes: prompts, tokens of each, positions before them, chunks in a row, executions."""
    tokens = r.seq - r.cached
    budget = r.budget or r.batch * tokens
    if r.chunked and tokens > budget:
        chunks, rest = divmod(tokens, budget)
        yield 1, budget, r.cached, chunks, r.batch
        if rest:
            yield 1, rest, r.seq - rest, 1, r.batch
        return
    together = min(r.batch, max(budget // tokens, 1))
    if r.phase == "serve":
        arriving = round(r.batch / r.new_tokens) if r.budget else 1  # without a server one after the other
        together = min(together, max(arriving, r.clustered // tokens, 1))
        yield together, tokens, r.cached, 1, r.batch / together
        return
    full, rest = divmod(r.batch, together)
    yield together, tokens, r.cached, 1, full
    if rest:
        yield rest, tokens, r.cached, 1, 1


def _steps(steps: int) -> tuple[Array, Array]:
    """Return numbers of steps (decode steps, chunks of a prompt) that are done after a step, and how many steps each
    number represents.

    The first steps and the last step are never shared: pruning depends on the first, cache memory on the last."""
    size = steps // (2 * DECODE_LENGTHS) * 2 + 1  # odd, so the middle step represents all
    shared = max(steps - 2, 0) // size
    alone = steps - 1 - size * shared
    middle = alone + size * np.arange(shared) + (size + 1) // 2
    executions = np.repeat([1, size, 1], [alone, shared, 1])
    return np.concatenate([1 + np.arange(alone), middle, [steps]]), executions


def _attention_columns(windows: tuple[int, ...], kv_len: Array, times: Array, first: int) -> Array:
    """Return attention of consecutive layers from ``first``, at rising cache lengths, with ``times`` executions each.

    The result has one column per length and run of equal layers, and the rows first layer, layers, window, length and
    executions. A window longer than the cache has no effect, so layers differ only from some length on."""
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
