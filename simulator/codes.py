"""Names and codes that tables, operators, profiles and engines share."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from enum import IntEnum
from pathlib import Path
from types import MappingProxyType

import numpy as np
from numpy.typing import NDArray

from simulator.arrays import Array
from simulator.errors import InputError
from simulator.names import DTYPES as DTYPES
from simulator.names import PHASES as PHASES
from simulator.names import STACKS as STACKS


class Kind(IntEnum):
    """Codes of operators (:data:`simulator.operators.OPERATORS`), and of errors of the host."""

    GEMM = 0
    PREFILL_ATTENTION = 1
    DECODE_ATTENTION = 2
    ELEMENTWISE = 3
    COLLECTIVE = 4
    HOST = 5  # not in workloads: marks errors of the host
    EXPERTS = 6  # routed experts of a layer
    DELTA_NET = 7  # gated delta net of a layer
    INDEXER = 8  # scores and selection of positions for sparse attention
    STATE_SPACE = 9  # recurrence of a Mamba layer or of linear attention
    SHORT_CONV = 10  # causal convolution of each channel over a few positions


class Part(IntEnum):
    """Part of the decoder; depth pruning removes ATTENTION and MLP."""

    EMBEDDING = 0
    ATTENTION = 1
    MLP = 2
    HEAD = 3


class Kernel(IntEnum):
    """Kernel of an operator; it determines whether zeros save time."""

    DENSE = 0  # computes zeros
    SPARSE24 = 1  # 2:4 sparse tensor cores, compressed weights
    UNSTRUCTURED = 2  # scattered zeros: counted in bounds, timed as dense
    BLOCK_SPARSE = 3  # skips tiles: attention blocks, or tokens of a GEMM sorted by a mask
    GROUPS_N = 4  # skips groups of output features of a GEMM per token
    GROUPS_K = 5  # skips groups of input features of a GEMM per token
    SPMV = 6  # scattered zeros times one token; stores nonzero values and their distances


class Phase(IntEnum):
    """Phase of inference of a row."""

    PREFILL = 0
    DECODE = 1


# plain numbers: NumPy compares an array with an IntEnum six times slower
GEMM, ELEMENTWISE, COLLECTIVE, EXPERTS = map(
    int, (Kind.GEMM, Kind.ELEMENTWISE, Kind.COLLECTIVE, Kind.EXPERTS)
)

DTYPE_BYTES: NDArray[np.float64] = np.array(
    [4.0, 4.0, 2.0, 2.0, 1.0, 1.0, 0.5, 1.0, 0.5625, 0.53125, 0.78125]
)
"""Stored bytes of one element by dtype code; nvfp4 has one scale byte per 16 elements, mxfp4 and
mxfp6 per 32."""

_GROUPS = json.loads(Path(__file__).with_name("roles.json").read_text(encoding="utf-8"))
ROLES: tuple[str, ...] = tuple(name for group in _GROUPS for name in group["names"])
"""Names of operator roles, with their meanings in ``roles.json``; the index is the code in the
column ``role`` and in files, so new names go to the end."""

_ROLE_CODE: Mapping[str, int] = MappingProxyType({name: code for code, name in enumerate(ROLES)})
_DTYPE_CODE: Mapping[str, int] = MappingProxyType({name: code for code, name in enumerate(DTYPES)})


def role_code(*names: str) -> Array:
    return np.array([_ROLE_CODE[name] for name in names], dtype=np.int16)


def dtype_code(name: str) -> int:
    if name not in _DTYPE_CODE:
        raise InputError(f"dtype {name!r} is unknown; expected one of {', '.join(DTYPES)}")
    return _DTYPE_CODE[name]


LABELS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {name: ("bf16", "fp16") for name in ("int8_wo", "int4_wo", "mxfp4_wo")}
    | {"fp8_block": ("fp8",)}
)
"""Number format of a section that is not an arithmetic format -> the arithmetic that it needs: 8-
and 4-bit weights with 16-bit activations, and fp8 with a scale per block of weights."""


def labels(rates: Iterable[str]) -> tuple[str, ...]:
    """Return the number formats that sections of a device with ``rates`` can have."""
    known = tuple(rates)
    return *known, *(
        label for label, needed in LABELS.items() if any(dtype in known for dtype in needed)
    )


def label_of(dtype: str, weight: str) -> str:
    """Return the number format of the section for activations and weights; the inverse of
    :func:`formats_of`."""
    own = weight == dtype or dtype in LABELS.get(weight, ())
    return weight if own else f"{weight}_wo"


def formats_of(label: str, rates: Iterable[str]) -> tuple[str, str]:
    """Return the formats of activations and weights of a section, on a device with ``rates``."""
    known, wide = tuple(rates), ("bf16", "fp16") if label.endswith("_wo") else ()
    arithmetic = next((dtype for dtype in LABELS.get(label, wide) if dtype in known), label)
    return arithmetic, label.removesuffix("_wo")
