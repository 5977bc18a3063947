"""Tile shapes of the Triton kernels, as pure functions of sizes: a test compiles every shape that
they can return.

The shapes are not tuned on a device. A product of few rows is bound by reading its weight: its
tiles are narrow, to use more processors, and read longer parts of each row.
"""

from __future__ import annotations

from dataclasses import dataclass

FEW_ROWS = 16  # rows of a tile that is bound by reading the weight; the minimum of a tensor core
MOST_TOKENS = 64  # tokens per tile of a grouped GEMM
MOST_FEATURES = 1 << 14  # features of a norm, which one program holds in registers
VECTOR_ELEMENTS = 1024  # elements per program of an elementwise kernel: 8 per thread of four warps


@dataclass(frozen=True)
class TileShape:
    """Rows and columns of the result per program, features per step, and warps."""

    m: int
    n: int
    k: int
    warps: int = 4


def power_of_two(size: int, least: int, most: int) -> int:
    """Return the smallest power of two that covers a size, within two powers of two."""
    return min(max(least, 1 << (size - 1).bit_length()), most)


def alignment(rows: int, columns: int) -> str:
    """Return which sizes are multiples of 16, for which Triton loads and stores 16 bytes at once:
    "all", "rows" (of the operands, not the columns of the result) or "none"."""
    return "none" if rows % 16 else "rows" if columns % 16 else "all"


def _most_columns(rows: int, element_bytes: int, aligned: str) -> int:
    """An element that is loaded alone has its own address in a register, and fp32 takes twice the
    space."""
    if rows <= FEW_ROWS or aligned == "none":
        return 32
    return (256 if aligned == "all" else 128) // element_bytes


def _most_features(rows: int, element_bytes: int, aligned: str) -> int:
    """Return the maximum features per step: 256 bytes of few rows, 128 of many, 64 if each element
    is loaded alone."""
    return (64 if aligned == "none" else 128 if rows > FEW_ROWS else 256) // element_bytes


def gathered(rows: int, element_bytes: int, aligned: str) -> TileShape:
    form = rows, element_bytes, aligned
    m = 128 if rows > MOST_TOKENS else tokens_per_tile(rows)
    return TileShape(m, _most_columns(*form), _most_features(*form), warps=8 if m == 128 else 4)


def tokens_per_tile(tokens: int) -> int:
    return FEW_ROWS if tokens <= FEW_ROWS else MOST_TOKENS


def grouped_columns(
    tokens: int, width: int, element_bytes: int, aligned: str, gated: bool
) -> TileShape:
    """Return the tile of a grouped GEMM that prunes columns in groups of ``width``; a gated group
    has two halves."""
    form = tokens, element_bytes, aligned
    most = _most_columns(*form) // (2 if gated and tokens > FEW_ROWS else 1)
    return TileShape(
        tokens_per_tile(tokens), power_of_two(width, min(32, most), most), _most_features(*form)
    )


def grouped_features(tokens: int, width: int, element_bytes: int, aligned: str) -> TileShape:
    form = tokens, element_bytes, aligned
    return TileShape(
        tokens_per_tile(tokens),
        _most_columns(*form),
        power_of_two(width, 16, _most_features(*form)),
    )


def normalised(features: int) -> TileShape:
    """Return the rows and features per program of a norm: whole rows, and several if they are
    short."""
    n = power_of_two(features, 128, MOST_FEATURES)
    return TileShape(max(1, VECTOR_ELEMENTS // n), n, 1, warps=min(max(4, n // 512), 16))


def rotated(half: int) -> TileShape:
    """Return the heads and the features of half a head per program of a rotary embedding."""
    n = power_of_two(half, 32, VECTOR_ELEMENTS // 2)
    return TileShape(VECTOR_ELEMENTS // 2 // n, n, 1)
