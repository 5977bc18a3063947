"""An operator of each kind, for the tests of devices."""

from __future__ import annotations

from typing import Any

from calibration.devices.protocol import OPERATORS, Operator


def every_kind(dtype: str, **shape: int) -> list[Operator]:
    """An operator of each kind, with the sizes in ``shape``."""
    more: dict[str, dict[str, Any]] = {
        "attention_decode": {"q_len": 1},
        "elementwise": {"role": "attention_norm"},
    }
    more |= {
        "attention_block_sparse": {"density": 0.5},
        "grouped_gemm": {"density": 0.5, "role": "down"},
    }
    sizes: dict[str, dict[str, Any]] = {
        kind: {n: shape[n] for n in names} for kind, names in OPERATORS.items()
    }
    return [Operator(kind, dtype, **{**sizes[kind], **more.get(kind, {})}) for kind in OPERATORS]
