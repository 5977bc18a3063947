"""Elementwise operators of a decoder as one Triton kernel each, as serving engines fuse them.

They read their inputs once and write their result once, and compute in fp32. This module needs Triton (extra
``kernels``).
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

from calibration.devices import tile_shapes

Tensor = Any


@triton.jit(do_not_specialize=["rows"])
def _rms_norm(x, weight, y, rows, n, epsilon, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    row, column = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
    within = column < n
    inside, at = (row < rows)[:, None] & within[None], row[:, None] * n + column[None]
    value = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    scale = tl.rsqrt(tl.sum(value * value, axis=1) / n + epsilon)
    factor = tl.load(weight + column, mask=within, other=0.0).to(tl.float32)
    tl.store(y + at, (value * scale[:, None] * factor[None]).to(y.dtype.element_ty), mask=inside)


def rms_norm(x: Tensor, weight: Tensor, epsilon: float = 1e-5) -> Tensor:
    """Normalise the last axis by its root mean square; x is contiguous, its last axis at most MOST_FEATURES long."""
    n = x.shape[-1]
    y, rows, tile = x.new_empty(x.shape), x.numel() // n, tile_shapes.normalised(n)
    _rms_norm[(triton.cdiv(rows, tile.m),)](x, weight, y, rows, n, epsilon, tile.m, tile.n, num_warps=tile.warps)
    return y


@triton.jit(do_not_specialize=["heads"])
def _rotary(x, cos, sin, y, heads, half, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    head, column = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
    within = column < half
    inside = (head < heads)[:, None] & within[None]
    angle, at = token * 2 * half + column, ((token * heads + head) * 2 * half)[:, None] + column[None]
    low, high = tl.load(x + at, mask=inside).to(tl.float32), tl.load(x + at + half, mask=inside).to(tl.float32)
    c_low, s_low = tl.load(cos + angle, mask=within).to(tl.float32), tl.load(sin + angle, mask=within).to(tl.float32)
    c_high = tl.load(cos + angle + half, mask=within).to(tl.float32)
    s_high = tl.load(sin + angle + half, mask=within).to(tl.float32)
    tl.store(y + at, (low * c_low[None] - high * s_low[None]).to(y.dtype.element_ty), mask=inside)
    tl.store(y + at + half, (high * c_high[None] + low * s_high[None]).to(y.dtype.element_ty), mask=inside)


def rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the halves of the last axis of x (tokens, heads, head_dim) by angles (tokens, head_dim), as contiguous
    cosines and sines."""
    (tokens, heads, width), y = x.shape, x.new_empty(x.shape)
    tile = tile_shapes.rotated(width // 2)
    grid = tokens, triton.cdiv(heads, tile.m)
    _rotary[grid](x, cos, sin, y, heads, width // 2, tile.m, tile.n, num_warps=tile.warps)
    return y


@triton.jit
def _gated(gate, up, y, elements, BLOCK_N: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = at < elements
    value = tl.load(gate + at, mask=inside).to(tl.float32)
    value = value / (1.0 + tl.exp(-value)) * tl.load(up + at, mask=inside).to(tl.float32)
    tl.store(y + at, value.to(y.dtype.element_ty), mask=inside)


def gated(gate: Tensor, up: Tensor) -> Tensor:
    """Compute silu(gate) * up of contiguous tensors."""
    y, elements = gate.new_empty(gate.shape), gate.numel()
    _gated[(triton.cdiv(elements, tile_shapes.VECTOR_ELEMENTS),)](gate, up, y, elements, tile_shapes.VECTOR_ELEMENTS)
    return y
