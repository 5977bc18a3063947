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

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import groupby
from typing import Any

import numpy as np

from simulator.arrays import Array
from simulator.codes import DTYPE_BYTES, Kernel, Kind, Part, Phase, dtype_code
from simulator.engines.engine import Engine, Schedule, load_engine
from simulator.errors import InputError
from simulator.models.config import Block, ModelConfig, shard
from simulator.models.library import load_model
from simulator.operators.experts import EXPERT_SKEW
from simulator.request import SETTINGS, Lowered, Request
from simulator.workload import Workload

# prompts always get at least 1 / LEAST_PROMPTS of the token budget, as servers limit the number of
# decoding sequences
LEAST_PROMPTS = 4
# Up to twice this number of decode steps, each step has an attention row. Beyond, neighbours share
# a row: FLOPs and bytes stay exact except where a window fills up, and times change by less than
# 1e-4.
DECODE_LENGTHS = 1024

SPARSE: tuple[str, ...] = ("q", "k", "v", "qkv", "o", "gate", "up", "gate_up", "down", "delta_in")
"""Projections that a 2:4 checkpoint compresses."""

_QUANTIZE = {
    "qkv": "quantize",
    "gate_up": "quantize",
    "o": "quantize_heads",
    "down": "quantize_inner",
}
"""Role of the conversion of a product's activations."""

_MXFP4 = dtype_code("mxfp4")
# format of the recurrent state of a delta net, as Transformers and SGLang keep it
_STATE = dtype_code("fp32")
OperatorRow = dict[str, Any]


def lower(model: str | ModelConfig | Request, **settings: Any) -> Workload:
    """Return the operators of one decoder pass, one row per shape.

    Equal requests return the same object.

    Parameters
    ----------
    model : str or ModelConfig
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
        else Request(model=model, **settings)
    )
    # the level and a measured time change no operator
    request = replace(
        request, model=load_model(request.model), level=0.9, dense_s=None, ideal=False
    )
    return _lower(request, load_engine(request.engine))


def stream_of(dtype: str) -> str:
    """Return the format of the residual stream, and the default of the cache, if layers compute in
    ``dtype``."""
    return dtype if DTYPE_BYTES[dtype_code(dtype)] >= 2 else "bf16"


def cached_tokens(request: Request) -> int:
    """Return the tokens of each prompt that the prefix cache holds; InputError if no token is left
    to compute."""
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
    weight, stream = (
        request.weight_dtype or model.weight_dtype or request.dtype,
        stream_of(request.dtype),
    )
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
    meta = Lowered(
        **{name: getattr(request, name) for name in (*SETTINGS, "positions")} | resolved | shapes
    )
    r = Lowering(
        request=meta,
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
            passes.append(
                PassRows(r, part, Phase.PREFILL, prompts, tokens, chunks * each, first=not passes)
            )
            done, runs = _steps(chunks)
            lengths.append((past + tokens * done, runs * each))
    if meta.phase != "prefill":
        steps = max(meta.new_tokens, 1)
        passes.append(PassRows(r, part, Phase.DECODE, meta.batch, meta.positions, steps))
        grown = (
            (np.array([(steps + 1) // 2]), np.array([steps]))
            if meta.phase == "serve"
            else _steps(steps)
        )
        lengths.append((meta.seq + meta.positions - 1 + grown[0], grown[1]))
    w = Workload.computed([row for one in passes for row in one.rows()], meta)
    rows = np.flatnonzero(w.is_role("attention"))
    if not len(rows):
        return w
    attending = [
        (first, many) for first, many, block in part.runs if block.heads and not block.delta
    ]
    attention = [
        _attention_columns(model.windows[first : first + many], kv_len, executions, first)
        for kv_len, executions in lengths
        for first, many in attending
    ]
    times = np.ones(len(w), dtype=np.int64)
    times[rows] = [columns.shape[1] for columns in attention]
    w = w.take(np.repeat(np.arange(len(w)), times))
    rows = w.is_role("attention")
    columns = {
        name: getattr(w, name).copy() for name in ("layer", "layers", "window", "kv_len", "count")
    }
    for column, values in zip(columns.values(), np.hstack(attention)):
        column[rows] = values
    return w.replace(**columns)


def _prefills(r: Lowered, schedule: Schedule | None) -> Iterator[tuple[int, int, int, int, float]]:
    """Yield kinds of prefill passes: prompts, tokens per prompt, positions before them, chunks,
    executions."""
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


def _attention_columns(windows: tuple[int, ...], kv_len: Array, times: Array, first: int) -> Array:
    """Return attention of consecutive layers from ``first`` at rising cache lengths, with ``times``
    executions each.

    Each column is a length and a run of equal layers; rows are first layer, layers, window, length
    and executions. Layers are equal while their windows are longer than the cache."""
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


@dataclass(frozen=True)
class Lowering:
    """A request with its model and engine, and the codes of its number formats."""

    request: Lowered
    engine: Engine
    sparse24: bool
    dtype: int
    weight_dtype: int
    cache_dtype: int
    stream_dtype: int

    @property
    def split(self) -> bool:
        """Whether each layer is split over several devices."""
        return self.request.devices > 1 and self.request.parallel != "pipeline"

    @property
    def quantised(self) -> tuple[str, ...]:
        """Products whose activations a further kernel converts."""
        return self.engine.quantize.inputs if DTYPE_BYTES[self.dtype] < 2.0 else ()


@dataclass(frozen=True)
class PassRows:
    """Rows of equal prefill passes, or of the decode steps of a request; one attention row per run
    of equal layers."""

    lowering: Lowering
    part: ModelConfig  # the shapes of one device
    phase: Phase
    batch: int  # sequences
    q_len: int
    steps: float  # executions of the pass; in the steady state of ``serve`` their mean
    first: bool = True  # whether it is the first pass of its phase, whose rows have the parameters

    @property
    def request(self) -> Lowered:
        return self.lowering.request

    @property
    def tokens(self) -> int:
        return self.batch * self.q_len

    def fuses(self, group: str) -> bool:
        return group in self.lowering.engine.fuse

    @property
    def mean_length(self) -> float:
        """Mean cache length of the decode steps, with the added position."""
        return self.request.seq + (self.steps + 1) / 2

    @property
    def wide(self) -> OperatorRow:
        return {"dtype": self.lowering.stream_dtype, "weight_dtype": self.lowering.stream_dtype}

    @property
    def owns(self) -> float:
        """Share of the parameters that each execution of the rows counts."""
        return (
            self.first
            * (self.phase == Phase.PREFILL or self.request.phase == "decode")
            / self.steps
        )

    def rows(self) -> list[OperatorRow]:
        model, vocab, h = self.part, self.part.vocab, self.part.hidden
        # positions that the head computes; a check of drafted tokens needs all
        many = self.tokens if self.lowering.engine.logits == "all" or self.decodes else self.batch
        tables = 2 if model.learned_positions else 1
        rows = [
            self.move(
                "embedding", Part.EMBEDDING, h, tables * h, h, (vocab + model.learned_positions) * h
            )
        ]
        rows[0]["q_len"] = self.q_len * self.decodes  # tokens per sequence of a step
        rows += self.collective("all_reduce", Part.EMBEDDING, self.tokens, h)
        for first, length, block in model.runs:
            layers = {"layer": first, "layers": length, "count": length}
            rows += [row | layers for row in (*self.attention(block), *self.mlp(block))]
        width = model.head_hidden
        if model.final_norm:
            owned = width * model.norm_parameters // h
            rows.append(self.move("final_norm", Part.HEAD, width, 2 * width, width, owned))
        head = self.gemm("lm_head", Part.HEAD, vocab, width, False) | self.wide | {"m": many}
        rows.append(head | {"params": 0 if model.tied else head["params"]})
        rows += self.collective("all_gather", Part.HEAD, many, self.request.config.vocab)
        if model.logit_softcap:
            whole = self.request.config.vocab
            rows.append(self.move("softcap", Part.HEAD, whole, whole, whole, tokens=many))
        rows += self.sends()
        return [
            row | {"phase": self.phase, "count": row.get("count", 1) * self.steps} for row in rows
        ]

    def attention(self, block: Block) -> Iterator[OperatorRow]:
        model, part, h, d = self.part, Part.ATTENTION, self.part.hidden, self.part.head_dim
        if "attention" not in block.linear and not block.heads:
            return
        yield from self.norm_before("attention_norm", part)
        yield from self.quantized("qkv", part, h)
        if "attention" in block.linear:
            yield self.linear(part)
        elif block.delta:
            yield from self.delta_net(block)
        elif model.latent is not None:
            yield from self.latent_attention(block)
        else:
            q, kv = block.heads * d, block.kv_heads * d
            made = {"q": (1 + model.output_gate) * q, "k": kv, "v": kv}
            for role, n in block.roles("qkv", made, self.fuses("qkv")).items():
                yield from self.projection(block, role, part, n, h, model.qkv_bias)
            if model.qk_norm and (model.qk_norm != "unit" or block.rotary):
                owned = {"head": 2 * d, "width": q + kv}.get(model.qk_norm, 0)
                yield self.move("qk_norm", part, q + kv, q + kv, q + kv, owned)
            yield from self.rotary(block, block.heads + block.kv_heads, model.rotary_dim)
            yield self.cache_write(block, 2 * kv)
            row = self.attend(block, {"kv_heads": block.kv_heads, "head_dim": d})
            yield row | {"params": model.sinks * block.heads * self.owns}
            if model.output_gate:
                yield self.move("output_gate", part, q, 2 * q, q)
            yield from self.quantized("o", part, q)
            yield from self.projection(block, "o", part, h, q, model.o_bias)
        yield from self.collective("all_reduce", part, self.tokens, h)
        yield from self.shortcut(block, part, h)
        yield from self.norm_after(part)

    def delta_net(self, block: Block) -> Iterator[OperatorRow]:
        own, part, h = self.part.delta, Part.ATTENTION, self.part.hidden
        assert own is not None
        keys, values = own.widths(block)
        yield self.gemm("delta_in", part, 2 * keys + 2 * values, h, False)
        yield self.gemm("delta_ba", part, 2 * block.heads, h, False) | self.wide
        owned = own.conv * (2 * keys + values) + 2 * block.heads
        row = {
            "kind": Kind.DELTA_NET,
            "role": "delta_net",
            "part": part,
            "params": owned * self.owns,
        }
        row |= {"m": self.tokens, "n": values, "batch": self.batch, "window": own.conv}
        row |= {
            "heads": block.heads,
            "kv_heads": block.kv_heads,
            "head_dim": own.key,
            "value_dim": own.value,
        }
        yield row | {"dtype": self.lowering.stream_dtype, "weight_dtype": _STATE}
        yield self.move("gated_norm", part, values, 2 * values, values, own.value)
        yield from self.quantized("o", part, values)
        yield self.gemm("o", part, h, values, False)

    def latent_attention(self, block: Block) -> Iterator[OperatorRow]:
        """Yield the rows of latent attention; a copied cache has keys and values of every head, and
        a decode step computes those of its token."""
        own, whole = self.part.latent, self.lowering.engine.cache != "paged"
        part, h, heads = Part.ATTENTION, self.part.hidden, block.heads
        assert own is not None
        absorbs = self.decodes and not whole
        queries = heads * (own.plain + own.rotary)
        if not own.query_rank:
            yield self.gemm("q", part, queries, h, False)
        elif self.fuses("qkv"):
            yield self.gemm("qkv_a", part, own.query_rank + own.cached, h, False)
        else:
            yield self.gemm("q_a", part, own.query_rank, h, False)
        if not (own.query_rank and self.fuses("qkv")):
            yield self.gemm("kv_a", part, own.cached, h, False)
        normed = own.query_rank + own.rank
        yield self.move("latent_norm", part, normed, normed, normed, normed)
        if own.query_rank:
            yield self.gemm("q_b", part, queries, own.query_rank, False)
        if absorbs:
            yield self.gemm("absorb_k", part, heads * own.rank, own.plain, False)
        else:
            yield self.gemm("kv_b", part, heads * (own.plain + own.value), own.rank, False)
        yield from self.rotary(block, heads + 1, own.rotary)
        yield self.cache_write(
            block, heads * (own.plain + own.rotary + own.value) if whole else own.cached
        )
        sizes = {"kv_heads": heads, "head_dim": own.plain + own.rotary, "value_dim": own.value}
        if absorbs:
            sizes = {"kv_heads": 1, "head_dim": own.cached, "value_dim": own.rank}
        yield self.attend(block, sizes | {"latent": 0 if whole else own.cached})
        if absorbs:
            yield self.gemm("absorb_v", part, heads * own.value, own.rank, False)
        yield from self.quantized("o", part, heads * own.value)
        yield self.gemm("o", part, h, heads * own.value, False)

    @property
    def decodes(self) -> bool:
        return self.phase == Phase.DECODE

    def rotary(self, block: Block, heads: int, features: int) -> Iterator[OperatorRow]:
        if turned := heads * features * block.rotary:
            yield self.move("rotary", Part.ATTENTION, turned, turned, turned)

    def cache_write(self, block: Block, elements: int) -> OperatorRow:
        """Return the row that writes the cache; a joined cache is extended, a copied one is then
        repeated for every query head."""
        r, part = self.lowering, Part.ATTENTION
        read, write = (
            float(elements),
            elements * float(DTYPE_BYTES[r.cache_dtype] / DTYPE_BYTES[r.stream_dtype]),
        )
        kept = {}
        if r.engine.cache != "paged" and self.decodes:
            repeats = (
                block.heads // block.kv_heads
                if r.engine.cache == "copied" and block.heads > block.kv_heads
                else 0
            )
            copied = self.mean_length * (1 + repeats)
            reads = copied + (self.mean_length if repeats else 0)
            read, write = read + write * reads, write * copied
            kept = {"kv_len": int(self.mean_length)}
        return self.move("cache_write", part, elements, read, write) | {
            "weight_dtype": r.cache_dtype,
            **kept,
        }

    def attend(self, block: Block, sizes: OperatorRow) -> OperatorRow:
        r = self.lowering
        kind = Kind.DECODE_ATTENTION if self.decodes else Kind.PREFILL_ATTENTION
        formats = {"dtype": r.stream_dtype, "weight_dtype": r.cache_dtype}
        calls = {"heads": block.heads, "batch": self.batch, "q_len": self.q_len}
        return {
            "kind": kind,
            "role": "attention",
            "part": Part.ATTENTION,
            **formats,
            **calls,
            **sizes,
        }

    def mlp(self, block: Block) -> Iterator[OperatorRow]:
        model, part, h, inner = self.part, Part.MLP, self.part.hidden, block.inner
        bias, out = model.mlp_bias, block.out or h
        if not (inner or block.experts or "mlp" in block.linear):
            return
        yield from self.norm_before("mlp_norm", part)
        if inner or "mlp" in block.linear:
            yield from self.quantized("gate_up", part, h)
        if "mlp" in block.linear:
            yield self.linear(part)
        elif inner:
            made = {"gate": inner, "up": inner} if model.gated else {"up": inner}
            for role, n in block.roles(
                "gate_up", made, model.gated and self.fuses("gate_up")
            ).items():
                yield from self.projection(block, role, part, n, h, bias)
            yield self.move("activation", part, inner, (2 if model.gated else 1) * inner, inner)
            yield from self.quantized("down", part, inner)
            yield from self.projection(block, "down", part, out, inner, bias or model.down_bias)
        if block.experts:
            yield from self.routed(block)
        yield from self.collective("all_reduce", part, self.tokens, out)
        yield from self.shortcut(block, part, out)
        yield from self.norm_after(part)
        if model.parallel_residual:
            yield self.move("residual", part, h, 2 * h, h)

    def routed(self, block: Block) -> Iterator[OperatorRow]:
        model, part, h = self.part, Part.MLP, self.part.hidden
        if model.shared_gate and block.inner:
            yield self.gemm("shared_gate", part, 1, h, False) | self.wide
        devices = self.request.devices if self.request.parallel == "expert" else 1
        yield self.gemm("router", part, devices * block.experts, h, model.router_bias) | self.wide
        row = self.gemm("experts", part, block.expert_inner, h, False) | {"kind": Kind.EXPERTS}
        owned = block.experts * model.expert_parameters(block) * self.owns
        row |= {
            "experts": block.experts,
            "active": block.active,
            "skew": self.request.skew,
            "params": owned,
        }
        captured = self.lowering.engine.captured
        if self.decodes and captured is not None and captured.pads(self.batch):
            row |= {"m": self.tokens + 1}  # the padding repeats one token, which uses experts too
        yield row | ({"batch": devices} if devices > 1 else {})

    def projection(
        self, block: Block, role: str, part: Part, n: int, k: int, bias: bool
    ) -> Iterator[OperatorRow]:
        """Yield the product of a projection, or the two products of its factors."""
        rank = block.rank(role)
        if not rank:
            yield self.gemm(role, part, n, k, bias)
        else:
            yield self.gemm(role, part, rank, k, False) | {"stage": 1}
            yield self.gemm(role, part, n, rank, bias) | {"stage": 2}

    def quantized(self, product: str, part: Part, k: int) -> Iterator[OperatorRow]:
        """Yield the conversion of a product's activations, if a further kernel does it."""
        r = self.lowering
        if product in r.quantised:
            written = k * float(DTYPE_BYTES[r.dtype] / DTYPE_BYTES[r.stream_dtype])
            yield self.move(_QUANTIZE[product], part, k, k, written)

    def shortcut(self, block: Block, part: Part, n: int) -> Iterator[OperatorRow]:
        """Yield the product that rotates the residual of a sublayer, which pruning (SliceGPT)
        adds."""
        if part.name.lower() in block.shortcuts:
            row = self.gemm("residual_projection", part, n, self.part.hidden, False)
            yield row | self.wide | {"overhead": True}

    def linear(self, part: Part) -> OperatorRow:
        """Return the product that replaces a sublayer; devices that share layers split its
        inputs."""
        h, devices = self.part.hidden, self.request.devices if self.lowering.split else 1
        return self.gemm("linear", part, h, -(-h // devices), False)

    def norm_before(self, role: str, part: Part) -> Iterator[OperatorRow]:
        """Yield the norm before a sublayer; it adds the residual, unless both sublayers read the
        same input."""
        model, h = self.part, self.part.hidden
        moved = h if model.parallel_residual and part == Part.MLP else 2 * h
        if model.pre_norms:
            yield self.move(role, part, h, moved, moved, model.norm_parameters)

    def norm_after(self, part: Part) -> Iterator[OperatorRow]:
        """Yield the norm of a sublayer's output; it adds the residual if no norm precedes the next
        sublayer."""
        model, h = self.part, self.part.hidden
        if model.post_norms:
            yield self.move(
                "post_norm", part, h, h if model.pre_norms else 2 * h, h, model.norm_parameters
            )

    def gemm(self, role: str, part: Part, n: int, k: int, bias: bool) -> OperatorRow:
        weights = self.lowering.weight_dtype
        if weights == _MXFP4 and role != "experts":  # a format of routed experts only
            weights = self.lowering.stream_dtype
        formats = {"dtype": self.lowering.dtype, "weight_dtype": weights}
        params = (n * k + bias * n) * self.owns
        row = {
            "role": role,
            "part": part,
            "m": self.tokens,
            "n": n,
            "k": k,
            "params": params,
            **formats,
        }
        if self.lowering.sparse24 and role in SPARSE:
            row |= {
                "kernel": Kernel.SPARSE24,
                "density": 0.5,
                "params": (0.5 * n * k + bias * n) * self.owns,
            }
        return row

    def move(
        self,
        role: str,
        part: Part,
        n: int,
        read: float,
        write: float,
        params: int = 0,
        tokens: int = 0,
    ) -> OperatorRow:
        """Return an elementwise row over ``tokens`` positions of ``n`` features; reads and writes
        are in elements."""
        stream, tokens = self.lowering.stream_dtype, tokens or self.tokens
        size = float(tokens * DTYPE_BYTES[stream])
        row = {
            "kind": Kind.ELEMENTWISE,
            "role": role,
            "part": part,
            "m": tokens,
            "n": n,
            "params": params * self.owns,
        }
        return row | {
            "read_bytes": size * read,
            "write_bytes": size * write,
            "dtype": stream,
            "weight_dtype": stream,
        }

    def collective(self, role: str, part: Part, tokens: int, width: int) -> list[OperatorRow]:
        """Return the collective whose payload is (tokens, width); no row on one device."""
        if not self.lowering.split:
            return []
        stream = self.lowering.stream_dtype
        row = {
            "kind": Kind.COLLECTIVE,
            "role": role,
            "part": part,
            "m": tokens,
            "n": width,
            "dtype": stream,
        }
        return [
            row
            | {"batch": self.request.devices, "read_bytes": tokens * width * DTYPE_BYTES[stream]}
        ]

    def sends(self) -> list[OperatorRow]:
        """Return a pipeline's sends of the residual stream, each between two devices; layer pruning
        keeps them."""
        if self.request.devices == 1 or self.lowering.split:
            return []
        tokens, hidden = self.tokens, self.request.config.hidden
        payload = tokens * hidden * float(DTYPE_BYTES[self.lowering.stream_dtype])
        row = {"kind": Kind.COLLECTIVE, "role": "send", "part": Part.HEAD, "m": tokens, "n": hidden}
        return [row | {"batch": 2, "read_bytes": payload, "count": self.request.devices - 1}]
