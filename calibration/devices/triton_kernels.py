"""Triton kernels: GEMMs that skip rows or groups of channels, and fused elementwise operators. All
compute in fp32.

The GEMMs read the choice from tensors on the device (an index and a count, or :class:`Tiles`), and
grids depend only on shapes: no launch waits for the host, and a CUDA graph can contain all
launches. Elementwise kernels read their inputs once and write their result once, as in serving
engines.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl

from calibration.devices import tile_shapes

Tensor = Any


def precision(x: Tensor) -> str:
    """Return the precision of fp32 products in torch's current setting: exact, or tf32 on tensor
    cores."""
    rounded = x.dtype == torch.float32 and torch.get_float32_matmul_precision() != "highest"
    return "tf32" if rounded else "ieee"


@dataclass(frozen=True)
class Tiles:
    users: Tensor  # (groups, tokens): tokens that use the group come first
    many: Tensor  # (groups,): number of tokens that use the group
    order: Tensor  # (tokens,): tokens with equal masks are neighbours
    groups: Tensor  # (tiles, groups), int32: used groups come first
    used: Tensor  # (tiles,), int32: number of used groups
    edge: int  # tokens per tile


def tiles_of(mask: Tensor) -> Tiles:
    tokens, groups = mask.shape
    edge = tile_shapes.tokens_per_tile(tokens)
    # masks as numbers of 62 bits, sorted from the last digit to the first by stable sorts
    order = torch.arange(tokens, device=mask.device)
    for start in reversed(range(0, groups, 62)) if tokens > edge else ():  # one tile needs no order
        digits = mask[:, start : start + 62].long()
        number = (digits << torch.arange(digits.shape[1] - 1, -1, -1, device=mask.device)).sum(1)
        order = order.gather(0, number.gather(0, order).sort(stable=True).indices)
    padded = (
        torch.nn.functional.pad(mask[order], (0, 0, 0, -tokens % edge)) if tokens > edge else mask
    )
    used = padded.view(-1, min(edge, tokens), groups).any(1)
    ranked = used.to(torch.int8).sort(dim=1, descending=True, stable=True).indices
    users = mask.t().to(torch.int8).contiguous().sort(dim=1, descending=True, stable=True).indices
    many = mask.sum(0, dtype=torch.int32)
    return Tiles(users, many, order, ranked.int(), used.sum(1, dtype=torch.int32), edge)


# the values 1 and multiples of 16 of these sizes need no kernels of their own: no read has them as
# stride or length
@triton.jit(do_not_specialize=["tokens", "groups"])
def _columns(
    x,
    weight,
    bias,
    users,
    count,
    y,
    tokens,
    groups,
    width,
    k,
    BIASED: tl.constexpr,
    GATED: tl.constexpr,
    ADD: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    group = tl.program_id(1).to(tl.int64)
    start = tl.program_id(2) * BLOCK_M
    many = tl.load(count + group)
    if start < many:
        positions = start + tl.arange(0, BLOCK_M)
        columns = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
        there = positions < many
        inside = columns < width
        rows = tl.load(users + group * tokens + positions, mask=there, other=0).to(tl.int64)
        first = group * (2 if GATED else 1) * width
        total = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
        second = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
        for begin in range(0, k, BLOCK_K):
            features = begin + tl.arange(0, BLOCK_K)
            within = features < k
            some = tl.load(
                x + rows[:, None] * k + features[None],
                mask=there[:, None] & within[None],
                other=0.0,
            )
            both = within[:, None] & inside[None]
            part = tl.load(
                weight + (first + columns[None]) * k + features[:, None], mask=both, other=0.0
            )
            total = tl.dot(some, part, total, input_precision=PRECISION)
            if GATED:
                up = tl.load(
                    weight + (first + width + columns[None]) * k + features[:, None],
                    mask=both,
                    other=0.0,
                )
                second = tl.dot(some, up, second, input_precision=PRECISION)
        if BIASED:
            total += tl.load(bias + group * width + columns, mask=inside, other=0.0).to(tl.float32)[
                None
            ]
        if GATED:
            total = total / (1.0 + tl.exp(-total)) * second
        out = y + rows[:, None] * groups * width + group * width + columns[None]
        written = there[:, None] & inside[None]
        if ADD:
            total += tl.load(out, mask=written, other=0.0).to(tl.float32)
        tl.store(out, total.to(y.dtype.element_ty), mask=written)


def gather_gemm(
    x: Tensor,
    weight: Tensor,
    index: Tensor,
    count: Tensor,
    bias: Tensor | None = None,
    *,
    out: Tensor | None = None,
    add: bool = False,
) -> Tensor:
    """Compute y[r] = x[r] weight^T + bias for the first ``count`` (on the device) distinct rows r
    of ``index``. x (m, k), weight (n, k) and out (m, n) are contiguous. ``out`` receives the
    products (``add``: their sum with it) and keeps its other rows. By default y is new, and its
    other rows are undefined."""
    (m, k), n = x.shape, weight.shape[0]
    y = x.new_empty(m, n) if out is None else out
    many = len(index)
    tile = tile_shapes.gathered(many, x.element_size(), tile_shapes.alignment(k, n))
    _columns[triton.cdiv(n, tile.n), 1, triton.cdiv(many, tile.m)](  # one group of columns
        x,
        weight,
        weight if bias is None else bias,
        index,
        count,
        y,
        many,
        1,
        n,
        k,
        bias is not None,
        False,
        add,
        tile.m,
        tile.n,
        tile.k,
        precision(x),
        num_warps=tile.warps,
    )
    return y


def grouped_columns(
    x: Tensor, weight: Tensor, tiles: Tiles, bias: Tensor | None = None, gated: bool = False
) -> Tensor:
    """Compute y = x weight^T + bias where a token uses a column's group (N pruned), and 0
    elsewhere. The rows of ``weight`` (n, k) are in groups of equal width; x and weight are
    contiguous. ``gated``: a group has the rows of its gate, then of its up projection; y is
    silu(gate) up, half as wide."""
    (tokens, k), groups = x.shape, len(tiles.many)
    n = weight.shape[0] // 2 if gated else weight.shape[0]
    width = n // groups
    y = x.new_zeros(tokens, n)
    aligned = tile_shapes.alignment(k, width)
    tile = tile_shapes.grouped_columns(tokens, width, x.element_size(), aligned, gated)
    _columns[triton.cdiv(width, tile.n), groups, triton.cdiv(tokens, tile.m)](
        x,
        weight,
        weight if bias is None else bias,
        tiles.users,
        tiles.many,
        y,
        tokens,
        groups,
        width,
        k,
        bias is not None,
        gated,
        False,
        tile.m,
        tile.n,
        tile.k,
        precision(x),
        num_warps=tile.warps,
    )
    return y


@triton.jit(do_not_specialize=["tokens", "groups"])
def _features(
    x,
    weight,
    order,
    chosen,
    used,
    y,
    tokens,
    groups,
    width,
    n,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    tile = tl.program_id(1)
    positions = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    there = positions < tokens
    inside = columns < n
    rows = tl.load(order + positions, mask=there, other=0).to(tl.int64)
    total = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    steps = tl.cdiv(width, BLOCK_K)
    last = tl.load(used + tile) * steps
    # the next group's number is read a step ahead: Triton double-buffers no copy that waits for a
    # read in its step
    group = tl.load(chosen + tile * groups)
    for step in range(0, last):
        features = step % steps * BLOCK_K + tl.arange(0, BLOCK_K)
        within = features < width
        at = group.to(tl.int64) * width + features
        some = tl.load(
            x + rows[:, None] * groups * width + at[None],
            mask=there[:, None] & within[None],
            other=0.0,
        )
        part = tl.load(
            weight + at[:, None] * n + columns[None], mask=within[:, None] & inside[None], other=0.0
        )
        group = tl.load(chosen + tile * groups + (step + 1) // steps, mask=step + 1 < last, other=0)
        total = tl.dot(some, part, total, input_precision=PRECISION)
    tl.store(
        y + rows[:, None] * n + columns[None],
        total.to(y.dtype.element_ty),
        mask=there[:, None] & inside[None],
    )


def grouped_features(x: Tensor, weight: Tensor, tiles: Tiles) -> Tensor:
    """Compute y = x weight over the features of the groups that a tile uses (K pruned). ``x``
    (tokens, k) is 0 where a token does not use a feature's group, as after :func:`grouped_columns`;
    ``weight`` is (k, n) with rows in groups of equal width; both are contiguous."""
    (tokens, k), n, groups = x.shape, weight.shape[1], len(tiles.many)
    width = k // groups
    # both are lengths of rows
    y = x.new_empty(tokens, n)
    aligned = tile_shapes.alignment(math.gcd(width, n), n)
    tile = tile_shapes.grouped_features(tokens, width, x.element_size(), aligned)
    _features[triton.cdiv(n, tile.n), len(tiles.groups)](
        x,
        weight,
        tiles.order,
        tiles.groups,
        tiles.used,
        y,
        tokens,
        groups,
        width,
        n,
        tile.m,
        tile.n,
        tile.k,
        precision(x),
        num_warps=tile.warps,
    )
    return y


@triton.jit(do_not_specialize=["rows"])
def _rms_norm(x, weight, y, rows, n, epsilon, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    column = tl.arange(0, BLOCK_N)
    within = column < n
    inside = (row < rows)[:, None] & within[None]
    at = row[:, None] * n + column[None]
    value = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    scale = tl.rsqrt(tl.sum(value * value, axis=1) / n + epsilon)
    factor = tl.load(weight + column, mask=within, other=0.0).to(tl.float32)
    tl.store(y + at, (value * scale[:, None] * factor[None]).to(y.dtype.element_ty), mask=inside)


def rms_norm(x: Tensor, weight: Tensor, epsilon: float = 1e-5) -> Tensor:
    """Normalise the last axis by its root mean square; x is contiguous, its last axis at most
    MOST_FEATURES long."""
    n = x.shape[-1]
    y = x.new_empty(x.shape)
    rows = x.numel() // n
    tile = tile_shapes.normalised(n)
    _rms_norm[(triton.cdiv(rows, tile.m),)](
        x, weight, y, rows, n, epsilon, tile.m, tile.n, num_warps=tile.warps
    )
    return y


@triton.jit(do_not_specialize=["heads"])
def _rotary(x, cos, sin, y, heads, half, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    column = tl.arange(0, BLOCK_N)
    within = column < half
    inside = (head < heads)[:, None] & within[None]
    angle = token * 2 * half + column
    at = ((token * heads + head) * 2 * half)[:, None] + column[None]
    low = tl.load(x + at, mask=inside).to(tl.float32)
    high = tl.load(x + at + half, mask=inside).to(tl.float32)
    c_low = tl.load(cos + angle, mask=within).to(tl.float32)
    s_low = tl.load(sin + angle, mask=within).to(tl.float32)
    c_high = tl.load(cos + angle + half, mask=within).to(tl.float32)
    s_high = tl.load(sin + angle + half, mask=within).to(tl.float32)
    tl.store(y + at, (low * c_low[None] - high * s_low[None]).to(y.dtype.element_ty), mask=inside)
    tl.store(
        y + at + half,
        (high * c_high[None] + low * s_high[None]).to(y.dtype.element_ty),
        mask=inside,
    )


def rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the halves of the last axis of x (tokens, heads, head_dim) by angles (tokens,
    head_dim), contiguous."""
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
    y = gate.new_empty(gate.shape)
    elements = gate.numel()
    _gated[(triton.cdiv(elements, tile_shapes.VECTOR_ELEMENTS),)](
        gate, up, y, elements, tile_shapes.VECTOR_ELEMENTS
    )
    return y
