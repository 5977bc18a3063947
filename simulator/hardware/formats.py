"""Number formats of a profile's sections: those of activations, and those of kernels whose weights are in another."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from types import MappingProxyType

LABELS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {name: ("bf16", "fp16") for name in ("int8_wo", "int4_wo", "mxfp4_wo")} | {"fp8_block": ("fp8",)}
)
"""Number formats of a section beside the arithmetic ones -> the arithmetic they need: 8- and 4-bit weights alone, and
fp8 with a scale for every block of weights."""


def labels(rates: Iterable[str]) -> tuple[str, ...]:
    """Number formats that sections of a device with some rates may have.

    >>> labels(["fp16", "fp8"])
    ('fp16', 'fp8', 'int8_wo', 'int4_wo', 'mxfp4_wo', 'fp8_block')
    """
    known = tuple(rates)
    return *known, *(label for label, needed in LABELS.items() if any(dtype in known for dtype in needed))


def label_of(dtype: str, weight: str) -> str:
    """Number format of the section for activations (and arithmetic) and weights; :func:`formats_of` is its reverse.

    >>> label_of("bf16", "int4"), label_of("fp8", "fp8_block"), label_of("bf16", "bf16")
    ('int4_wo', 'fp8_block', 'bf16')
    """
    return dtype if weight == dtype else weight if weight in LABELS else f"{weight}_wo"


def formats_of(label: str, rates: Iterable[str]) -> tuple[str, str]:
    """Format of activations and of weights that a section of a device with some rates is for.

    >>> formats_of("int4_wo", ["fp32", "fp16"]), formats_of("fp8", ["fp8"])
    (('fp16', 'int4'), ('fp8', 'fp8'))
    """
    known = tuple(rates)
    arithmetic = next((dtype for dtype in LABELS.get(label, ()) if dtype in known), label)
    return arithmetic, label.removesuffix("_wo")
