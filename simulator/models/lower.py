"""Lower a decoder and a request to the table of operators that an inference engine runs:
:func:`lower`.

The engine determines which projections are one GEMM, and which positions the head computes.
Assumptions:

- Norms add the residual: ``attention_norm`` and ``mlp_norm`` read the residual stream and the
  output of the previous sublayer, and write their sum and its norm (2 + 2 tensors). The norm of the
  first layer counts the same.
- If attention and MLP read the same input (GPT-NeoX), ``mlp_norm`` only normalises, and a row
  ``residual`` adds both outputs.
- Scaling of the embedding, soft-capping of attention and biases are fused: no rows, no bytes.
- Bytes of token ids, norm weights and rotary tables are excluded (below 0.1 % of any pass), and so
  is sampling.
- ``dtype`` is the format of the GEMMs of the layers. With 8 or 4 bits, the residual stream,
  attention, embedding and head stay in bf16.
- ``weight_dtype`` applies only to the projections of the layers: quantised checkpoints keep
  embedding and head in 16 bits.
- Products below 16 bits read activations in their format. As the engine's file states, the kernel
  before a product writes this format, or a further kernel converts to it (``quantize``). Latent
  vectors are converted with their norm.
- A copied cache (Transformers) is read and written in each decode step, and once more for every
  query head if query heads share keys. Attention reads this copy; the row ``cache_write`` has these
  bytes.
- Routed experts are one row per layer, with all their kernels except the router. Shared experts are
  an MLP.
- Latent attention: a prefill computes keys and values of every head. A decode step attends to the
  latent vector; the halves of one weight transform queries and outputs (``absorb_k``,
  ``absorb_v``), unless the cache is copied.
- Decode: each sequence adds one token to ``seq`` cached positions and attends to ``seq + 1``. A
  step that checks drafted tokens adds several ``positions``, and the head computes them all.
- Generate: one attention row per decode step; of thousands of steps, neighbours share one row of
  their middle length.
- Token budget: a prefill pass computes as many whole prompts as fit, at least one. If the engine
  has chunks, a longer prompt is computed in chunks, each of which attends to the earlier chunks.
- Prefix caching: the first tokens of each prompt are in the cache; a prefill computes and writes
  only the others.
- Serve is the steady state of continuous batching. During one request, every request in flight gets
  one prefill and ``new_tokens`` decode steps, with caches half grown on average. Prompts that
  arrive during one decode step (``batch / new_tokens``) are computed in one pass within the budget,
  and so are short prompts of neighbouring steps (``Schedule.clustered``).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from itertools import groupby
from typing import Any

import numpy as np

from simulator.arguments import MOST
from simulator.arrays import Array
from simulator.codes import DTYPE_BYTES, ROLES, Part, Phase, dtype_code
from simulator.display import with_and
from simulator.engines.engine import Engine, Schedule, load_engine
from simulator.errors import InputError
from simulator.models.library import load_model
from simulator.models.model import Layer, Model, shard
from simulator.models.pass_rows import Lowering, OperatorRow, OperatorRows, PassRows
from simulator.models.sublayers import SharedCacheAttention
from simulator.models.sublayers.entry import Streams
from simulator.operators.experts import EXPERT_SKEW
from simulator.request import DEFAULT_DTYPE, Lowered, Request, known
from simulator.workload import Workload

# prompts always get at least 1 / LEAST_PROMPTS of the token budget, as servers limit the number of
# decoding sequences
LEAST_PROMPTS = 4
# Up to twice this number of decode steps, each step has an attention row. Beyond, neighbours share
# a row: FLOPs and bytes stay exact except where a window fills up, and times change by less than
# 1e-4.
DECODE_LENGTHS = 1024

_ROLES = {role: code for code, role in enumerate(ROLES)}


def lower(model: str | Model | Request, **settings: Any) -> Workload:
    """Return the operators of one decoder pass, one row per shape.

    Equal requests return the same object.

    Parameters
    ----------
    model : str or Model
        Model: a name or a path, or shapes from :func:`simulator.load_model`. A
        :class:`simulator.Request` states the settings too.
    **settings
        Fields of :class:`simulator.Request`, such as ``phase``, ``batch``, ``seq`` and ``engine``
        ("": bare kernels without fusion). Without a ``token_budget``, that of the engine on GPUs of
        much memory counts (:class:`simulator.engines.engine.Schedule`); engines without a schedule
        compute all prompts in one pass.

    Returns
    -------
    Workload
        Operators of the pass on one device, or of all stages of a pipeline. Parameters are counted
        in the prefill rows only.

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
    request = (
        replace(model, **settings)
        if isinstance(model, Request)
        else Request(model=model, **known(settings))
    )
    # the level and a measured time change no operator
    request = replace(request, model=load_model(request.model), level=0.9, dense_s=None)
    return _lower(request, load_engine(request.engine))


def lower_again(request: Request, model: Model, ideal: bool) -> Workload:
    """Return the operators of another model in the request of a workload."""
    return _lower(request.with_model(model, ideal), load_engine(request.engine))


def stream_of(dtype: str) -> str:
    """Return the format of the residual stream, and the default of the cache, if layers compute in
    ``dtype``."""
    return dtype if DTYPE_BYTES[dtype_code(dtype)] >= 2 else "bf16"


@dataclass(frozen=True)
class NumberFormats:
    dtype: str
    weight_dtype: str
    kv_dtype: str

    @property
    def text(self) -> str:
        """The formats in words: ``bf16 with int4 weights``."""
        weights = [f"{self.weight_dtype} weights"] if self.weight_dtype != self.dtype else []
        cache = [f"{self.kv_dtype} cache"] if self.kv_dtype != stream_of(self.dtype) else []
        return " with ".join(filter(None, (self.dtype, with_and([*weights, *cache]))))


def number_formats(request: Request, model: Model) -> NumberFormats:
    """Return the formats of a model in a request: those that the request states, else those of the
    checkpoint, whose arithmetic belongs to its own weights; InputError if both are unknown."""
    if model.unread_format and request.weight_dtype is None:
        raise InputError(
            f"{model.name}: {model.unread_format} is not understood; state the format of its"
            " weights, such as --weight-dtype int4"
        )
    own = model.dtype if request.weight_dtype in (None, model.weight_dtype) else ""
    dtype = request.dtype or own or DEFAULT_DTYPE
    return NumberFormats(
        dtype=dtype,
        weight_dtype=request.weight_dtype or model.weight_dtype or dtype,
        kv_dtype=request.kv_dtype or model.kv_dtype or stream_of(dtype),
    )


def cached_tokens(request: Request) -> int:
    """Return the tokens of each prompt that the prefix cache holds; InputError if no token is left
    to compute."""
    prefix = request.cached_prefix
    seq = request.seq
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
        return max(budget - request.batch, budget // LEAST_PROMPTS, 1)
    return budget


@lru_cache(maxsize=256)
def _lower(request: Request, engine: Engine) -> Workload:
    model = request.model
    lowering = _lowering(request, engine)
    part = shard(model, request.devices, request.parallel)
    table = _Table()
    lengths = []
    for p, cached in _passes(lowering):
        _add_pass(table, p, part, model.logits)
        lengths.append(cached)
    return _attending(table.workload(lowering.request), part, lengths)


def _lowering(request: Request, engine: Engine) -> Lowering:
    """Return the request with the values that follow from model and engine."""
    model = request.model
    several = request.devices > 1
    formats = number_formats(request, model)
    has_kernels = engine.sparse24_kernels(formats.dtype, formats.weight_dtype) is not None
    runs_sparse24 = not request.engine or has_kernels
    resolved = Lowered(
        request=request,
        model=model.name,
        config=model,
        engine=request.engine,
        phase=request.phase,
        batch=request.batch,
        seq=request.seq,
        new_tokens=request.new_tokens if request.phase in ("generate", "serve") else 0,
        cached_prefix=cached_tokens(request),
        token_budget=_budget(request, engine.schedule),
        **vars(formats),
        devices=request.devices,
        link=(request.link or "") if several else "",
        parallel=request.parallel if several else "none",
        skew=EXPERT_SKEW if request.skew is None else request.skew,
        positions=request.positions,
    )
    return Lowering(
        request=resolved,
        engine=engine,
        dtype=dtype_code(formats.dtype),
        weight_dtype=dtype_code(formats.weight_dtype),
        cache_dtype=dtype_code(formats.kv_dtype),
        stream_dtype=dtype_code(stream_of(formats.dtype)),
        hidden=model.hidden,
        norm_parameters=model.norm_parameters,
        pre_norms=model.pre_norms,
        post_norms=model.post_norms,
        declared24=model.declared == "2:4" and runs_sparse24,
        ideal=request.ideal,
    )


def _passes(lowering: Lowering) -> Iterator[tuple[PassRows, tuple[Array, Array]]]:
    """Yield each kind of pass, with the cache lengths at which it attends and how often."""
    request = lowering.request
    if request.phase != "decode":
        first = True
        for prompts, tokens, past, chunks, each in _prefills(request, lowering.engine.schedule):
            executions = chunks * each
            p = PassRows(lowering, Phase.PREFILL, prompts, tokens, executions, first=first)
            done, times = _steps(chunks)
            yield p, (past + tokens * done, times * each)
            first = False
    if request.phase != "prefill":
        steps = max(request.new_tokens, 1)
        p = PassRows(lowering, Phase.DECODE, request.batch, request.positions, steps)
        grown, times = _steps(steps)
        if request.phase == "serve":
            grown = np.array([(steps + 1) // 2])
            times = np.array([steps])
        yield p, (request.seq + request.positions - 1 + grown, times)


def _prefills(r: Lowered, schedule: Schedule | None) -> Iterator[tuple[int, int, int, int, float]]:
    """Yield kinds of prefill passes: prompts, tokens per prompt, positions before them, chunks,
    executions."""
    cached = int(r.cached_prefix)
    limit = r.token_budget or 0
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
        # without a server, prompts run one by one
        arriving = round(r.batch / r.new_tokens) if limit else 1
        clustered = schedule.clustered if schedule else 0
        together = min(together, max(arriving, clustered // tokens, 1))
        yield together, tokens, cached, 1, r.batch / together
        return
    full, rest = divmod(r.batch, together)
    yield together, tokens, cached, 1, full
    if rest:
        yield rest, tokens, cached, 1, 1


def _steps(steps: int) -> tuple[Array, Array]:
    """Return the numbers of steps (decode steps or chunks of a prompt) done after representative
    steps, and how many steps each represents. The first steps, on which pruning depends, and the
    last represent only themselves."""
    size = steps // (2 * DECODE_LENGTHS) * 2 + 1  # odd, so the middle step represents all
    shared = max(steps - 2, 0) // size
    alone = steps - 1 - size * shared
    middle = alone + size * np.arange(shared) + (size + 1) // 2
    executions = np.repeat([1, size, 1], [alone, shared, 1])
    return np.concatenate([1 + np.arange(alone), middle, [steps]]), executions


@dataclass
class _Table:
    """Rows of a workload in the making. A row can stand for several runs of layers: its values are
    arrays then, and ``places`` are those of its runs."""

    columns: dict[str, list[Any]] = field(default_factory=dict)
    places: list[int] = field(default_factory=list)

    def add(self, row: OperatorRow, places: Sequence[int]) -> None:
        for name, value in row.items():
            column = self.filled(name)
            if isinstance(value, np.ndarray) and value.ndim:
                column.extend(value.tolist())
            else:
                column.extend([_ROLES[value] if name == "role" else value] * len(places))
        self.places.extend(places)

    def filled(self, name: str) -> list[Any]:
        """Return a column with its default in rows that do not state it."""
        column = self.columns.setdefault(name, [])
        column.extend([Workload.SCHEMA[name][1]] * (len(self.places) - len(column)))
        return column

    def workload(self, meta: Lowered) -> Workload:
        size = len(self.places)
        for name in self.columns:
            self.filled(name)
        exact = all(max(column) <= MOST for column in self.columns.values())
        make = Workload.filled if exact else Workload.from_columns
        w = make(meta, size=size, **self.columns)
        order = np.argsort(np.array(self.places))
        return w if (np.diff(order) == 1).all() else w.take(order)


def _add_pass(table: _Table, p: PassRows, part: Model, logits: int) -> None:
    """Add the rows of a pass of the model that one device computes; ``logits`` are those of the
    whole model."""
    _add_outside(table, p, _embedding(p, part))
    runs = part.runs
    made = [(list(members), [*_layer_rows(p, layer)]) for members, layer in part.stacks]
    sizes = np.zeros(len(runs), dtype=np.intp)
    for members, rows in made:
        sizes[members] = len(rows)
    begins = len(table.places) + np.cumsum(sizes) - sizes
    for members, rows in made:
        lengths = np.array([runs[i].length for i in members])
        layers = {
            "layer": np.array([runs[i].first for i in members]),
            "layers": lengths,
            "count": lengths * p.steps,
            "phase": p.phase,
        }
        for i, row in enumerate(rows):
            table.add({**row, **layers}, (begins[members] + i).tolist())
    _add_outside(table, p, itertools.chain(_head(p, part, logits), p.send()))


def _add_outside(table: _Table, p: PassRows, rows: Iterable[OperatorRow]) -> None:
    """Add rows outside the layers."""
    for row in rows:
        count = row.get("count", 1) * p.steps
        table.add({**row, "phase": p.phase, "count": count}, [len(table.places)])


def _layer_rows(p: PassRows, layer: Layer) -> OperatorRows:
    attention = layer.of("attention")
    if isinstance(attention, SharedCacheAttention):
        p = attention.computed(p)
    for index, sublayer in enumerate(layer.sublayers):
        for row in _sublayer_rows(p, layer, index):
            yield row | {"params": 0.0} if sublayer.reused else row


def _sublayer_rows(p: PassRows, layer: Layer, index: int) -> OperatorRows:
    sublayer = layer.sublayers[index]
    part = sublayer.part
    mlp = part == Part.MLP
    before, after = layer.norms(index, p.lowering.pre_norms, p.lowering.post_norms)
    entry = sublayer.entry
    if entry is not None:
        yield from entry.before(p, part)
    if before:
        role = "mlp_norm" if mlp else "attention_norm"
        streams = isinstance(entry, Streams)
        yield p.norm_before(role, part, adds=not (layer.parallel and mlp) and not streams)
    yield from sublayer.rows(p)
    outputs = sublayer.outputs(p.hidden)
    if sublayer.REDUCES:
        yield from p.collective("all_reduce", part, p.tokens, outputs)
    yield from p.residual_projection(sublayer, outputs)
    if after:
        yield p.norm_after(part, adds=not before)
    if entry is not None:
        yield from entry.after(p, part)
    if sublayer.scales:
        yield p.move("residual", part, p.hidden, 2 * p.hidden, p.hidden, p.hidden)
    if layer.joined(index) or (mlp and layer.parallel):
        yield p.move("residual", part, p.hidden, 2 * p.hidden)


def _embedding(p: PassRows, part: Model) -> OperatorRows:
    hidden = part.hidden
    positions = part.learned_positions
    features = part.embedding_width or hidden
    read = features + hidden * (positions > 0)
    owned = part.vocab * features + positions * hidden + part.other_parameters
    row = p.move("embedding", Part.EMBEDDING, features, read, features, owned)
    # tokens per sequence of a step
    yield row | {"q_len": p.q_len * p.decodes}
    yield from p.collective("all_reduce", Part.EMBEDDING, p.tokens, features)
    if part.embedding_width:
        yield p.wide_gemm("embedding_in", Part.EMBEDDING, hidden, features)
    if part.embedding_norm:
        owned = features * part.norm_parameters // hidden
        yield p.move("embedding_norm", Part.EMBEDDING, features, params=owned)
    if part.input_features:
        yield from _layer_inputs(p, part)
    if part.streams > 1:
        yield from _streams(p, part, Part.EMBEDDING)


def _layer_inputs(p: PassRows, part: Model) -> OperatorRows:
    """Yield the inputs of all layers: embeddings from their tables, and a projection of the usual
    embedding, which is normed and added."""
    features = part.input_features
    yield p.move("layer_inputs", Part.EMBEDDING, features, params=part.input_tables)
    yield from p.collective("all_reduce", Part.EMBEDDING, p.tokens, features)
    yield p.wide_gemm("layer_inputs", Part.EMBEDDING, features, part.hidden)
    yield p.move("layer_inputs", Part.EMBEDDING, features, 2 * features)


def _streams(p: PassRows, part: Model, place: Part) -> OperatorRows:
    """Yield the products that make further residual streams of the first, or map them back."""
    hidden = part.hidden
    further = part.streams - 1
    yield p.wide_gemm("altup", place, hidden, hidden) | {"count": further}
    yield p.move("altup", place, hidden, further * hidden, further * hidden)


def _head(p: PassRows, part: Model, logits: int) -> OperatorRows:
    """Yield the final norm and the head; ``logits`` are those of the whole model."""
    # positions that the head computes; a check of drafted tokens needs all
    positions = p.tokens if p.lowering.engine.logits == "all" or p.decodes else p.batch
    width = part.head_hidden
    if part.streams > 1:
        yield from _streams(p, part, Part.HEAD)
    if part.final_norm:
        owned = width * part.norm_parameters // part.hidden
        yield p.move("final_norm", Part.HEAD, width, 2 * width, width, owned)
    if part.embedding_width:
        yield p.wide_gemm("embedding_out", Part.HEAD, part.embedding_width, width)
        width = part.embedding_width
    if part.head_projection:
        yield p.wide_gemm("embedding_out", Part.HEAD, width, width) | {"m": positions}
        owned = p.lowering.norm_parameters
        yield p.move("inner_norm", Part.HEAD, width, params=owned, tokens=positions)
    head = p.wide_gemm("lm_head", Part.HEAD, part.logits, width) | {"m": positions}
    bias = part.head_bias * part.logits * p.owns
    yield head | {"params": bias + (0 if part.tied else head["params"])}
    yield from p.collective("all_gather", Part.HEAD, positions, logits)
    if part.logit_softcap:
        yield p.move("softcap", Part.HEAD, logits, tokens=positions)


def _attending(w: Workload, part: Model, lengths: Sequence[tuple[Array, Array]]) -> Workload:
    """Return the workload with a row of attention for each cache length and window. Each kind of
    pass, which has its own lengths, has equally many such rows."""
    rows = np.flatnonzero(w.attends)
    if not len(rows):
        return w
    windows = {run.first: run.windows for run in part.runs}
    attention = [
        _attention_columns(windows[first], kv_len, executions, first)
        for (kv_len, executions), firsts in zip(lengths, np.split(w.layer[rows], len(lengths)))
        for first in firsts.tolist()
    ]
    times = np.ones(len(w), dtype=np.int64)
    times[rows] = [columns.shape[1] for columns in attention]
    w = w.take(np.repeat(np.arange(len(w)), times))
    attends = w.attends
    names = ("layer", "layers", "window", "kv_len", "count")
    columns = {name: getattr(w, name).copy() for name in names}
    for column, values in zip(columns.values(), np.hstack(attention)):
        column[attends] = values
    return w.replace(**columns)


def _attention_columns(windows: tuple[int, ...], kv_len: Array, times: Array, first: int) -> Array:
    """Return attention of consecutive layers from ``first`` at rising cache lengths, with ``times``
    executions each.

    Each column is a length and a run of equal layers; rows are first layer, layers, window, length
    and executions. Layers are equal while their windows are longer than the cache."""
    if len(kv_len) == 1 and not any(windows):
        layers = len(windows)
        return np.array([[first], [layers], [0], [kv_len[0]], [layers * times[0]]])
    cuts = np.searchsorted(kv_len, sorted(set(windows) - {0}), side="right")
    pieces = []
    for lengths, many in zip(np.split(kv_len, cuts), np.split(times, cuts)):
        if not len(lengths):
            continue
        runs = []
        start = first
        for window, same in groupby(w if 0 < w < lengths[0] else 0 for w in windows):
            size = len(list(same))
            runs.append((start, size, window))
            start += size
        each = np.repeat(np.stack([lengths, many]), len(runs), axis=1)
        pieces.append(np.vstack([np.tile(np.array(runs).T, len(lengths)), each]))
    out = np.hstack(pieces)
    return np.vstack([out[:-1], out[1] * out[-1]])
