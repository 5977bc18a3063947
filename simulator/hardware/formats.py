"""Number formats of a profile's sections: of activations, and of kernels whose weights have another format; rates."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

LABELS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {name: ("bf16", "fp16") for name in ("int8_wo", "int4_wo", "mxfp4_wo")} | {"fp8_block": ("fp8",)}
)
"""Number format of a section that is not an arithmetic format -> the arithmetic that it needs.

These are 8- and 4-bit weights with 16-bit activations, and fp8 with a scale per block of weights."""


@dataclass(frozen=True)
class Rate:
    """Arithmetic rate of one number format."""

    flop_per_s: float  # dense, from the datasheet, at boost clock
    accumulate: str  # number format of the sums
    sparse_factor: float = 1.0  # rate of 2:4 sparse operands over the dense rate


def labels(rates: Iterable[str]) -> tuple[str, ...]:
    """Return the number formats that sections of a device with ``rates`` can have."""
    known = tuple(rates)
    return *known, *(label for label, needed in LABELS.items() if any(dtype in known for dtype in needed))


def label_of(dtype: str, weight: str) -> str:
    """Return the number format of the section for activations and weights; the inverse of :func:`formats_of`.

    >>> label_of("bf16", "int4"), label_of("fp8", "fp8_block"), label_of("bf16", "bf16")
    ('int4_wo', 'fp8_block', 'bf16')
    """
    return weight if weight == dtype or weight in LABELS else f"{weight}_wo"


def formats_of(label: str, rates: Iterable[str]) -> tuple[str, str]:
    """Return the formats of activations and of weights that a section is for, on a device with ``rates``.

    >>> formats_of("int4_wo", ["fp32", "fp16"]), formats_of("fp8", ["fp8"])
    (('fp16', 'int4'), ('fp8', 'fp8'))
    """
    known = tuple(rates)
    arithmetic = next((dtype for dtype in LABELS.get(label, ()) if dtype in known), label)
    return arithmetic, label.removesuffix("_wo")
