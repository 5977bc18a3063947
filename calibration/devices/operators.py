"""Operators in torch for the CUDA device, the CPU device and the executed decoder; and the common
code of both devices.

:func:`build` binds an :class:`Operator` to operands. Rotated operands are views into one
:class:`Arena` of random data that exceeds the last-level cache, so a round over them evicts the
first one, without allocations. The data is normal, because values change the power and so the
clock. Activations stay in the cache, as the previous kernel leaves them.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import import_module
from importlib.util import find_spec
from os import environ
from shutil import which
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from calibration.devices import attention, recurrent
from calibration.devices.attention import AttentionLibrary
from calibration.devices.protocol import (
    NORMS,
    RECURRENT,
    Description,
    Gpu,
    Operator,
    OutOfMemory,
    Sampler,
    Unsupported,
    selected,
)
from calibration.devices.tile_shapes import MOST_FEATURES
from simulator.codes import DTYPE_BYTES, dtype_code

Tensor = Any  # torch.Tensor; torch is optional, so its types are not relied upon

TORCH_DTYPE: dict[str, Any] = {
    "fp32": torch.float32,
    "tf32": torch.float32,
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
    "fp8": torch.float8_e4m3fn,
    "int8": torch.int8,
}
MAX_COPIES = 1 << 13  # a CUDA graph has a launch of each
PATTERNS = 8  # distinct masks of the tokens of a grouped GEMM
# 2:4 weights are packed one by one, so copies of small ones take time to make
MOST_PACKED = 1 << 10
_ALIGN = 256  # bytes; alignment of the CUDA allocator and of cuBLAS's fast kernels
_ROWS = 8  # a 2:4 product in 16 bits needs a multiple of this number of rows
# sizes of the layer that times the host
HIDDEN = 64
HEADS = 4
KV_HEADS = 2
HEAD_DIM = 16
INTERMEDIATE = 128
# layers launched in sequence, as in a pass; each has separate modules, weights and cache
LAYERS = 8

# algorithm of cuSPARSELt: its number and, if torch can search for it, the split of K
Algorithm = tuple[Any, ...]


@dataclass(frozen=True)
class Launches:
    # ``launch(i)`` runs it once with copy ``i % copies`` of its rotated operand
    launch: Callable[[int], Any]
    copies: int  # number of distinct copies; 1 if hot, or if one copy is larger than a round
    how: str = ""  # a comma and the implementation, if there are several


class Arena:
    """Random data for rotated operands: a round over them exceeds the cache ``rotation`` times, if
    memory allows."""

    def __init__(
        self, device: str, cache_bytes: float, limit_bytes: float, rotation: float = 2.0
    ) -> None:
        self.device = device
        self.round_bytes = min(rotation * cache_bytes, limit_bytes)
        self.limit_bytes = limit_bytes
        self._data: dict[str, Tensor] = {}

    def cut(self, elements: int, dtype: str, cold: bool) -> tuple[Callable[[int], Tensor], int]:
        """Return a function ``view(i)`` of flat views with ``elements`` each, and their number;
        ``i`` wraps around."""
        size = float(DTYPE_BYTES[dtype_code(dtype)])
        each = math.ceil(elements * size / _ALIGN) * _ALIGN  # bytes
        if each > self.limit_bytes:
            raise OutOfMemory(f"one operand takes {each:.3g} bytes, limit {self.limit_bytes:.3g}")
        copies = min(MAX_COPIES, max(1, math.ceil(self.round_bytes / each))) if cold else 1
        copies = min(copies, int(self.limit_bytes // each))
        data = self._get(dtype, int(copies * each / size))
        # small copies are spread over the arena, because neighbours would share DRAM pages and be
        # prefetched
        stride = int(data.numel() // copies * size // _ALIGN * _ALIGN / size) if copies > 1 else 0
        views = [data[i * stride : i * stride + elements] for i in range(copies)]
        return (lambda i: views[i % copies]), copies

    def _get(self, dtype: str, elements: int) -> Tensor:
        data = self._data.get(dtype)
        if data is None or data.numel() < elements:
            self._data.pop(dtype, None)
            while len(self._data) >= 2:  # formats alternate in a run, rarely more than two
                self._data.pop(next(iter(self._data)))
            least = int(self.round_bytes / float(DTYPE_BYTES[dtype_code(dtype)]))
            data = self._data[dtype] = random_tensor((max(elements, least),), dtype, self.device)
        return data

    def clear(self) -> None:
        self._data.clear()


def random_tensor(shape: tuple[int, ...], dtype: str, device: str, seed: int = 0) -> Tensor:
    """Return normal data (int8: integers); large shapes repeat a block, because generation is
    slow."""
    total = math.prod(shape)
    block = min(total, 1 << 22)
    generator = torch.Generator(device=device).manual_seed(seed)
    if dtype == "int8":
        values = torch.randint(
            -64, 65, (block,), dtype=torch.int8, device=device, generator=generator
        )
    else:
        values = torch.randn(block, dtype=torch.float32, device=device, generator=generator).to(
            TORCH_DTYPE[dtype]
        )
    return (
        values.reshape(shape)
        if block == total
        else values.repeat(-(-total // block))[:total].reshape(shape)
    )


def rms_norm(x: Tensor, weight: Tensor, epsilon: float = 1e-5) -> Tensor:
    return F.rms_norm(x, (x.shape[-1],), weight, epsilon)


def gated(gate: Tensor, up: Tensor) -> Tensor:
    return F.silu(gate).mul_(up)


def rotary_tables(
    positions: Tensor, head_dim: int, dtype: Any, frequency: Tensor = None
) -> tuple[Tensor, Tensor]:
    """Return cosines and sines of the rotary embedding, (positions, head_dim) each; Llama's
    frequencies by default."""
    if frequency is None:
        frequency = 10000.0 ** (
            -torch.arange(0, head_dim, 2, device=positions.device, dtype=torch.float32) / head_dim
        )
    angle = positions.to(torch.float32)[:, None] * frequency[None, :]
    angle = torch.cat((angle, angle), dim=-1)
    return angle.cos().to(dtype), angle.sin().to(dtype)


def rotate_half(x: Tensor) -> Tensor:
    low, high = x.chunk(2, dim=-1)
    return torch.cat((-high, low), dim=-1)


def rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return torch.addcmul(x * cos, rotate_half(x), sin)


def is_out_of_memory(error: BaseException) -> bool:
    if isinstance(error, (torch.OutOfMemoryError, MemoryError, OutOfMemory)):
        return True
    signs = ("can't allocate memory", "not enough memory", "out of memory")
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in signs)


@dataclass(frozen=True)
class SparseWeight:
    """A compressed weight (n, k) in which two of four neighbours in a row are zero, for sparse
    tensor cores. The library searches the fastest algorithm at the first call with a number of
    rows. The search waits for the device, so it must precede the capture of a CUDA graph. (torch's
    tensor class always uses algorithm 0, and its dispatcher.)"""

    packed: Tensor
    shape: tuple[int, int]
    searched: bool = True  # False: algorithm 0, as torch's tensor class
    # by rows of activations; equal shapes share it
    algorithms: dict[int, Algorithm] = field(default_factory=dict)

    def linear(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        flat = x.reshape(-1, self.shape[1])
        rows = len(flat)
        if rows % _ROWS:
            flat = F.pad(flat, (0, 0, 0, -rows % _ROWS))
        algorithm = self.algorithms.get(len(flat)) if self.searched else (0,)
        if algorithm is None:
            algorithm = self.algorithms[len(flat)] = _fastest(self.packed, flat.t(), bias)
        out = torch._cslt_sparse_mm(self.packed, flat.t(), bias, None, None, True, *algorithm)
        return out[:rows].view(*x.shape[:-1], self.shape[0])


def sparse_weight(
    weight: Tensor, algorithms: dict[int, Algorithm] | None = None, *, searched: bool = True
) -> SparseWeight:
    library = getattr(torch.backends, "cusparselt", None)
    if library is None or not library.is_available():
        raise Unsupported("2:4: this torch has no cuSPARSELt, or no kernels for this GPU")
    packed = torch._cslt_compress(weight.contiguous())
    return SparseWeight(
        packed, tuple(weight.shape), searched, {} if algorithms is None else algorithms
    )


def _fastest(packed: Tensor, dense: Tensor, bias: Tensor | None) -> Algorithm:
    """Return the last arguments of ``_cslt_sparse_mm``: the algorithm and, if torch searches for
    it, the split of K."""
    both = getattr(getattr(torch._C, "_cusparselt", None), "mm_search", None)
    if both is not None:
        return tuple(both(packed, dense, bias, None, None, True)[:3])
    return (torch._cslt_sparse_mm_search(packed, dense, bias, None, None, True),)


def linear(x: Tensor, weight: Any, bias: Tensor | None = None) -> Tensor:
    return weight.linear(x, bias) if isinstance(weight, SparseWeight) else F.linear(x, weight, bias)


class EagerNorm(nn.Module):  # type: ignore[misc]
    def __init__(self, features: int, **options: Any) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(features, **options))

    def forward(self, hidden: Tensor) -> Tensor:
        given = hidden.dtype
        hidden = hidden.to(torch.float32)
        variance = hidden.pow(2).mean(-1, keepdim=True)
        hidden = hidden * torch.rsqrt(variance + 1e-5)
        return self.weight * hidden.to(given)


class EagerCache:
    """Keys and values of earlier positions; an update returns them with the new ones and does not
    store these."""

    def __init__(self, kv_len: int, **options: Any) -> None:
        self.keys, self.values = torch.randn((2, 1, KV_HEADS, kv_len - 1, HEAD_DIM), **options)

    def update(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        return torch.cat((self.keys, keys), dim=-2), torch.cat((self.values, values), dim=-2)


def rotated(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    cos = cos.unsqueeze(1)
    sin = sin.unsqueeze(1)
    return (q * cos) + (rotate_half(q) * sin), (k * cos) + (rotate_half(k) * sin)


def repeated(x: Tensor, times: int) -> Tensor:
    batch, heads, positions, width = x.shape
    return (
        x[:, :, None]
        .expand(batch, heads, times, positions, width)
        .reshape(batch, heads * times, positions, width)
    )


class EagerAttention(nn.Module):  # type: ignore[misc]
    def __init__(self, kv_len: int, **options: Any) -> None:
        super().__init__()
        self.q_proj = nn.Linear(HIDDEN, HEADS * HEAD_DIM, bias=False, **options)
        self.k_proj = nn.Linear(HIDDEN, KV_HEADS * HEAD_DIM, bias=False, **options)
        self.v_proj = nn.Linear(HIDDEN, KV_HEADS * HEAD_DIM, bias=False, **options)
        self.o_proj = nn.Linear(HEADS * HEAD_DIM, HIDDEN, bias=False, **options)
        self.cache = EagerCache(kv_len, **options)

    def forward(self, hidden: Tensor, angles: tuple[Tensor, Tensor]) -> Tensor:
        before = hidden.shape[:-1]
        shape = (*before, -1, HEAD_DIM)
        q = self.q_proj(hidden).view(shape).transpose(1, 2)
        k = self.k_proj(hidden).view(shape).transpose(1, 2)
        v = self.v_proj(hidden).view(shape).transpose(1, 2)
        q, k = rotated(q, k, *angles)
        k, v = self.cache.update(k, v)
        k = repeated(k, HEADS // KV_HEADS)
        v = repeated(v, HEADS // KV_HEADS)
        q = q.contiguous()
        k = k.contiguous()
        v = v.contiguous()
        out = F.scaled_dot_product_attention(
            q, k, v, attn_mask=None, dropout_p=0.0, scale=HEAD_DIM**-0.5
        )
        return self.o_proj(out.transpose(1, 2).contiguous().reshape(*before, -1).contiguous())


class EagerMlp(nn.Module):  # type: ignore[misc]
    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(HIDDEN, INTERMEDIATE, bias=False, **options)
        self.up_proj = nn.Linear(HIDDEN, INTERMEDIATE, bias=False, **options)
        self.down_proj = nn.Linear(INTERMEDIATE, HIDDEN, bias=False, **options)
        self.act_fn = nn.SiLU()

    def forward(self, hidden: Tensor) -> Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(hidden)) * self.up_proj(hidden))


class EagerLayer(nn.Module):  # type: ignore[misc]
    """One decoder layer with the operations of Transformers' ``LlamaDecoderLayer`` ("sdpa"
    attention), in their order, for one token of one sequence and a cache of ``kv_len`` positions,
    including the new one. The layer is so small that every device is faster than its host."""

    def __init__(self, kv_len: int, **options: Any) -> None:
        super().__init__()
        self.self_attn = EagerAttention(kv_len, **options)
        self.mlp = EagerMlp(**options)
        self.input_layernorm = EagerNorm(HIDDEN, **options)
        self.post_attention_layernorm = EagerNorm(HIDDEN, **options)
        self.requires_grad_(False)

    def forward(self, hidden: Tensor, angles: tuple[Tensor, Tensor]) -> Tensor:
        residual = hidden
        hidden = residual + self.self_attn(self.input_layernorm(hidden), angles)
        residual = hidden
        return residual + self.mlp(self.post_attention_layernorm(hidden))


def triton_needs() -> str:
    """Return what this machine lacks to run Triton kernels on a GPU, or "". Triton compiles a
    launcher in C."""
    if find_spec("triton") is None:
        return "Triton (extra kernels)"
    if (
        environ.get("TRITON_INTERPRET") == "1"
        or environ.get("CC")
        or which("gcc")
        or which("clang")
    ):
        return ""
    return "a C compiler (gcc or clang, or CC) for Triton's launcher"


def in_triton(device: str) -> bool:
    return device.startswith("cuda") and not triton_needs()


def kernels() -> Any:
    return import_module("calibration.devices.triton_kernels")


def grouped_by_loops(x: Tensor, mask: Tensor, n: int, outer: bool) -> Callable[[Tensor], Tensor]:
    """Return x (m, k) times the groups of a weight that each token uses, by a gather, a GEMM and a
    scatter."""
    rows = [used.nonzero().squeeze(1) for used in mask.t()]
    groups = len(rows)

    def columns(weight: Tensor) -> Tensor:
        y = x.new_zeros(len(x), n)
        for index, part, out in zip(rows, weight.chunk(groups), y.chunk(groups, 1), strict=True):
            out.index_copy_(0, index, torch.mm(x.index_select(0, index), part.t()))
        return y

    def features(weight: Tensor) -> Tensor:
        y = x.new_zeros(len(x), n)
        for index, part, some in zip(rows, weight.chunk(groups), x.chunk(groups, 1), strict=True):
            y.index_add_(0, index, torch.mm(some.index_select(0, index), part))
        return y

    return columns if outer else features


def build(
    op: Operator, device: str, arena: Arena, library: AttentionLibrary | None = None
) -> Launches:
    if library is None or op.kind not in ("attention_prefill", "attention_decode"):
        return _BUILDERS[op.kind](op, device, arena)
    q = random_tensor((op.batch, op.q_len, op.heads, op.head_dim), op.dtype, device, 1)
    both, copies = _rotated(arena, op, *library.cache_shape(op))
    attend = library.bind(op, TORCH_DTYPE[op.dtype], device)
    return Launches(lambda i: attend(q, *both[i % copies]), copies, f", {library.describe(op)}")


def _rotated(arena: Arena, op: Operator, *shape: int) -> tuple[list[Tensor], int]:
    """Return the copies of the rotated operand as a list, which adds no call to the timed code, and
    their number."""
    flat, copies = arena.cut(math.prod(shape), op.dtype, op.cold)
    return [flat(i).view(shape) for i in range(copies)], copies


def _gemm(op: Operator, device: str, arena: Arena) -> Launches:
    x = random_tensor((op.m, op.k), op.dtype, device, 1)
    weights, copies = _rotated(arena, op, op.n, op.k)
    if op.dtype == "fp8":  # scales of one, results in bf16
        scale = torch.ones((), device=device)
        how: dict[str, Any] = {
            "scale_a": scale,
            "scale_b": scale,
            "out_dtype": torch.bfloat16,
            "use_fast_accum": True,
        }
        scaled = torch._scaled_mm
        return Launches(
            lambda i: scaled(x, weights[i % copies].t(), **how), copies, ", fast accumulation"
        )
    if op.dtype == "int8":
        return Launches(lambda i: torch._int_mm(x, weights[i % copies].t()), copies)
    linear = F.linear
    return Launches(lambda i: linear(x, weights[i % copies]), copies)


def _gemm_2to4(op: Operator, device: str, arena: Arena) -> Launches:
    x = random_tensor((op.m, op.k), op.dtype, device, 1)
    packed_bytes = 0.5625 * op.element_bytes * op.n * op.k
    copies = min(MOST_PACKED, math.ceil(arena.round_bytes / packed_bytes)) if op.cold else 1
    pruned = random_tensor((op.n, op.k), op.dtype, device, 2)
    pruned.view(op.n, op.k // 4, 4)[..., 2:] = 0  # the choice of two does not matter to the kernel
    algorithms: dict[int, Algorithm] = {}
    packed = [sparse_weight(pruned, algorithms) for _ in range(copies)]
    packed[0].linear(x)  # searches the algorithm before anything is timed or captured
    return Launches(
        lambda i: packed[i % copies].linear(x),
        copies,
        f", cuSPARSELt by search {[*algorithms.values()]}",
    )


def _low_rank(op: Operator, device: str, arena: Arena) -> Launches:
    x = random_tensor((op.m, op.k), op.dtype, device, 1)
    flat, copies = arena.cut(op.rank * (op.n + op.k), op.dtype, op.cold)
    split = op.rank * op.k
    first = [flat(i)[:split].view(op.rank, op.k) for i in range(copies)]
    second = [flat(i)[split:].view(op.n, op.rank) for i in range(copies)]
    return Launches(lambda i: F.linear(F.linear(x, first[i % copies]), second[i % copies]), copies)


def _gather_gemm(op: Operator, device: str, arena: Arena) -> Launches:
    x = random_tensor((op.m, op.k), op.dtype, device, 1)
    y = torch.zeros((op.m, op.n), dtype=x.dtype, device=device)
    index = (
        torch.randperm(op.m, generator=torch.Generator().manual_seed(op.rows))[: op.rows]
        .sort()
        .values.to(device)
    )
    weights, copies = _rotated(arena, op, op.n, op.k)
    if in_triton(device):
        # a router leaves an index with room for all tokens, and their number on the device
        room = F.pad(index, (0, op.m - op.rows))
        count = torch.tensor([op.rows], dtype=torch.int32, device=device)
        one = kernels().gather_gemm
        return Launches(
            lambda i: one(x, weights[i % copies], room, count, out=y),
            copies,
            ", one kernel (Triton)",
        )

    def launch(i: int) -> Tensor:
        return y.index_copy_(0, index, F.linear(x.index_select(0, index), weights[i % copies]))

    return Launches(launch, copies, ", a gather, a GEMM and a scatter")


def group_masks(op: Operator) -> Tensor:
    """Return the groups of each token of a grouped GEMM; a trained router chooses similarly for
    similar tokens."""
    generator = torch.Generator().manual_seed(op.m)
    groups = op.grouped // op.block
    used = max(1, round(op.density * groups))
    choices = torch.rand(PATTERNS, groups, generator=generator).topk(used, dim=1).indices
    patterns = torch.zeros(PATTERNS, groups, dtype=torch.bool).scatter_(1, choices, True)
    return patterns[torch.randint(PATTERNS, (op.m,), generator=generator)]


def _grouped_gemm(op: Operator, device: str, arena: Arena) -> Launches:
    x = random_tensor((op.m, op.k), op.dtype, device, 1)
    mask = group_masks(op).to(device)
    outer = op.role == "up"
    weights, copies = _rotated(arena, op, *((op.n, op.k) if outer else (op.k, op.n)))
    if not outer:
        x = x * mask.repeat_interleave(op.block, 1)
    if in_triton(device):
        tiles = kernels().tiles_of(mask)
        one = kernels().grouped_columns if outer else kernels().grouped_features
        over = (
            "the tokens of each group"
            if outer
            else f"tiles of {tiles.edge} tokens sorted by {PATTERNS} masks"
        )
        how = f", one kernel (Triton) over {over}"
        return Launches(lambda i: one(x, weights[i % copies], tiles), copies, how)
    launch = grouped_by_loops(x, mask, op.n, outer)
    how = ", a gather, a GEMM and a scatter for each group"
    return Launches(lambda i: launch(weights[i % copies]), copies, how)


def _attention(op: Operator, device: str, arena: Arena) -> Launches:
    q = random_tensor((op.batch, op.heads, op.q_len, op.head_dim), op.dtype, device, 1)
    both, copies = _rotated(arena, op, 2, op.batch, op.kv_heads, op.kv_len, op.head_dim)
    caches = [(keys, values) for keys, values in both]
    if op.kind == "attention_decode":
        decode = attention.decode_attention
        return _in_torch(
            lambda i: decode(q, *caches[i % copies]), copies, device, ", unpaged cache"
        )
    if op.kind == "attention_prefill":
        mask, prefill = (
            attention.causal_mask(op.q_len, op.kv_len, device),
            attention.prefill_attention,
        )
        return _in_torch(lambda i: prefill(q, *caches[i % copies], mask), copies, device)
    table = attention.block_layout(op.q_len, op.kv_len, op.block, op.density).to(device)
    if not device.startswith("cuda"):
        by_rows = attention.block_sparse_attention(table, op.q_len, op.kv_len, op.block)
        how = ", a gather and a dense attention for each block of queries"
        return Launches(lambda i: by_rows(q, *caches[i % copies]), copies, how)
    fused = attention.fused_block_sparse(table, op.q_len, op.kv_len, op.block)
    try:
        fused(q, *caches[0])  # compiles the kernel
    except Exception as error:
        if is_out_of_memory(error) or "CUDA error" in str(error):
            raise
        why = f"{type(error).__name__}: {error}".splitlines()[0]
        raise Unsupported(
            f"attention_block_sparse: flex attention did not compile: {why}"
        ) from error
    return Launches(
        lambda i: fused(q, *caches[i % copies]), copies, ", one fused kernel (flex attention)"
    )


def _in_torch(attend: Callable[[int], Any], copies: int, device: str, how: str = "") -> Launches:
    if not device.startswith("cuda"):
        return Launches(attend, copies)
    return Launches(attention.in_order_of_backends(attend), copies, f", SDPA of torch{how}")


def _elementwise(op: Operator, device: str, arena: Arena) -> Launches:
    inputs, copies = _rotated(arena, op, op.m, op.n)
    other = random_tensor((op.m, op.n), op.dtype, device, 1)
    # engines fuse a norm, a gated activation and a rotary embedding into one kernel each
    fused = in_triton(device) and not (op.role in NORMS and op.n > MOST_FEATURES)
    one: Any = kernels() if fused else None
    how = ", one kernel (Triton)" if fused else ""
    norm, product, turn = (
        (one.rms_norm, one.gated, one.rotary) if fused else (rms_norm, gated, rotary)
    )
    if op.role in NORMS:
        weight = random_tensor((op.n,), op.dtype, device, 2)
        return Launches(lambda i: norm(inputs[i % copies], weight), copies, how)
    if op.role == "activation":
        return Launches(lambda i: product(inputs[i % copies], other), copies, how)
    if op.role == "residual":
        return Launches(lambda i: inputs[i % copies] + other, copies)
    if op.role == "rotary":
        head = next((d for d in (128, 64, 32, 16, 8, 4, 2) if op.n % d == 0), 0)
        if not head:
            raise Unsupported(f"elementwise rotary: {op.n} features cannot be halved")
        cos, sin = (
            t.unsqueeze(1)
            for t in rotary_tables(torch.arange(op.m, device=device), head, other.dtype)
        )
        shape = (op.m, op.n // head, head)
        return Launches(lambda i: turn(inputs[i % copies].view(shape), cos, sin), copies, how)
    if op.role == "select":
        many = selected(op.n)
        return Launches(
            lambda i: inputs[i % copies].topk(many, dim=1).indices.sort(dim=1).values, copies
        )
    rows = torch.randperm(op.m, generator=torch.Generator().manual_seed(op.m)).to(device)
    if op.role in ("embedding", "gather"):
        return Launches(lambda i: inputs[i % copies].index_select(0, rows), copies)
    if op.role == "scatter":
        return Launches(lambda i: other.index_copy_(0, rows, inputs[i % copies]), copies)
    return Launches(lambda i: other.copy_(inputs[i % copies]), copies)  # cache_write


SCORES = 2**24  # scores of single heads that an indexer holds at a time, 64 MB


def _indexer(op: Operator, device: str, arena: Arena) -> Launches:
    """Return launches that compute the scores of some queries at a time, and select."""
    batch = op.batch
    heads = op.heads
    width = op.head_dim
    queries = random_tensor((batch, op.q_len, heads, width), op.dtype, device, 1)
    weights = random_tensor((batch, op.q_len, 1, heads), op.dtype, device, 2)
    keys, copies = _rotated(arena, op, batch, op.kv_len, width)
    later = torch.ones(op.q_len, op.kv_len, dtype=torch.bool, device=device)
    later = later.triu(op.kv_len - op.q_len + 1)
    many = min(op.k, op.kv_len)
    size = max(SCORES // (batch * heads * op.kv_len), 1)
    parts = [*zip(queries.split(size, 1), weights.split(size, 1))]

    def launch(i: int) -> Tensor:
        key = keys[i % copies].transpose(1, 2)
        sums = []
        for query, weight in parts:
            scores = torch.relu_(query.flatten(1, 2) @ key)
            sums.append((weight @ scores.unflatten(1, (-1, heads))).squeeze(2))
        total = torch.cat(sums, 1).float().masked_fill_(later, -math.inf)
        return total.topk(many, sorted=False).indices

    return Launches(launch, copies)


def _copy(op: Operator, device: str, arena: Arena) -> Launches:
    flat, copies = arena.cut(op.n, "int8", op.cold)
    if copies < 2:
        target = torch.empty(op.n, dtype=torch.int8, device=device)
        return Launches(lambda i: target.copy_(flat(0)), 1)
    # the target is half a round away, so neither is in the cache
    return Launches(lambda i: flat(i + copies // 2).copy_(flat(i)), copies)


def _recurrent(op: Operator, device: str, arena: Arena) -> Launches:
    # recurrent states are fp32 in all formats, the last positions of a convolution are not
    dtype = op.dtype if op.kind == "short_conv" else "fp32"
    shape = recurrent.state_shape(op)
    flat, copies = arena.cut(math.prod(shape), dtype, op.cold)
    states = [flat(i).view(shape) for i in range(copies)]
    run = recurrent.BUILDERS[op.kind](op, TORCH_DTYPE[op.dtype], states)
    return Launches(lambda i: run(i % copies), copies, ", functions of Transformers")


def _launch(op: Operator, device: str, arena: Arena) -> Launches:
    if op.role == "gemm":
        x = random_tensor((1, 64), op.dtype, device, 1)
        weight = random_tensor((64, 64), op.dtype, device, 2)
        return Launches(lambda i: F.linear(x, weight), 1)
    value = torch.zeros(1, device=device)
    return Launches(lambda i: value.add_(1.0), 1)


def _layer(op: Operator, device: str, arena: Arena) -> Launches:
    dtype = TORCH_DTYPE[op.dtype]
    layers = [EagerLayer(op.kv_len, device=device, dtype=dtype) for _ in range(LAYERS)]
    cos, sin = rotary_tables(torch.tensor([op.kv_len - 1], device=device), HEAD_DIM, dtype)
    hidden = random_tensor((1, 1, HIDDEN), op.dtype, device, 1)
    angles = (cos[None], sin[None])
    return Launches(lambda i: layers[i % LAYERS](hidden, angles), LAYERS)


_BUILDERS: dict[str, Callable[[Operator, str, Arena], Launches]] = {
    "gemm": _gemm,
    "gemm_2to4": _gemm_2to4,
    "low_rank": _low_rank,
    "gather_gemm": _gather_gemm,
    "grouped_gemm": _grouped_gemm,
    "attention_prefill": _attention,
    "attention_decode": _attention,
    "attention_block_sparse": _attention,
    "elementwise": _elementwise,
    **dict.fromkeys(RECURRENT, _recurrent),
    "copy": _copy,
    "launch_eager": _launch,
    "launch_graph": _launch,
    "layer_eager": _layer,
    "indexer": _indexer,
}


@dataclass(frozen=True)
class Timed:
    """A ``Prepared`` whose launches are timed by ``run``."""

    method: str
    run: Sampler
    device: TorchDevice
    operator: Operator

    def sample(self, loops: int) -> float:
        with self.device.translated(self.operator):
            return self.run(loops)


def host_loop(launches: Launches, synchronize: Callable[[], Any] = lambda: None) -> Sampler:
    launch = launches.launch
    copies = launches.copies
    following = 0

    def run(loops: int) -> float:
        nonlocal following
        first = following
        following = (first + loops) % copies
        synchronize()
        start = time.perf_counter_ns()
        for i in range(first, first + loops):
            launch(i)
        synchronize()
        return (time.perf_counter_ns() - start) * 1e-9 / loops

    return run


class TorchDevice:
    name: str
    rotation = 2.0  # a round over rotated operands exceeds this multiple of the last-level cache
    # kinds of operators that torch supports in fp8 and int8
    eight_bit: tuple[str, ...] = ("gemm", "copy")
    engine: AttentionLibrary | None = None  # attention library of the installed engine

    def __init__(self, device: str, cache_bytes: float, memory_limit_bytes: float) -> None:
        self.cache_bytes = cache_bytes
        self.memory_limit_bytes = memory_limit_bytes
        self._arena = Arena(device, cache_bytes, 0.5 * memory_limit_bytes, self.rotation)

    def description(
        self, hardware: str, stack: Mapping[str, str], gpu: Gpu | None = None
    ) -> Description:
        stack = {"torch": torch.__version__, **stack}
        return Description(
            self.name, hardware, stack, self.memory_limit_bytes, self.cache_bytes, gpu
        )

    def refuses(self, operator: Operator) -> str:
        if operator.dtype in ("fp8", "int8") and operator.kind not in self.eight_bit:
            return (
                f"{operator.kind} in {operator.dtype} is not implemented in torch; only gemm and"
                " copy are"
            )
        if operator.library and operator.library != (self.engine.name if self.engine else ""):
            return f"{operator.kind}: no engine with the library {operator.library} is installed"
        if operator.kind == "indexer" and self.name.startswith("cuda"):
            return "indexer: torch has no kernel like those of engines (DeepGEMM)"
        if operator.kind in RECURRENT:
            if self.name.startswith("cuda"):
                return f"{operator.kind}: its kernels on a GPU are those of other packages"
            if needs := recurrent.lacks():
                return f"{operator.kind} needs {needs}"
        if operator.kind == "attention_block_sparse":
            if (operator.kv_len - operator.q_len) % operator.block:
                return (
                    "attention_block_sparse needs kv_len - q_len to be a multiple of the block"
                    f" {operator.block}"
                )
            if self.name.startswith("cuda") and (needs := triton_needs()):
                return f"attention_block_sparse: flex attention needs {needs}"
        return ""

    def prepare(self, operator: Operator) -> Timed:
        if reason := self.refuses(operator):
            raise Unsupported(reason)
        if operator.footprint_bytes > self.memory_limit_bytes:
            limit = f"limit {self.memory_limit_bytes:.3g}"
            raise OutOfMemory(f"{operator.key} takes {operator.footprint_bytes:.3g} bytes, {limit}")
        with self.translated(operator):
            return Timed(*self._bind(operator), self, operator)

    @contextmanager
    def translated(self, operator: Operator) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            if (known := self._translate(error, operator)) is None:
                raise
            raise known from error

    def _bind(self, operator: Operator) -> tuple[str, Sampler]:
        """Return the timing method, and a function from a number of launches to seconds per
        launch."""
        raise NotImplementedError

    def _translate(self, error: BaseException, operator: Operator) -> Exception | None:
        raise NotImplementedError

    def clock(self) -> float:
        return time.monotonic()

    def rest(self, seconds: float) -> None:
        time.sleep(seconds)

    def close(self) -> None:
        self._arena.clear()

    def __enter__(self) -> Any:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
