"""Run code for a GPU without one: CPU tensors on a device that is named CUDA, and interpreted
Triton kernels.

Tests import this module before anything imports Triton, which reads the choice of its interpreter
once.
"""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"


class Cuda(str):
    """A torch device that calls itself a CUDA GPU."""

    def startswith(self, prefix: Any, *_: Any) -> bool:
        return "cuda:0".startswith(prefix)


CPU, META = Cuda("cpu"), Cuda("meta")
PLACE = "cuda" if torch.cuda.is_available() else "cpu"
"""Device on which kernels run in tests."""


def kernels(interpreted: bool = False) -> Any:
    """Return the module of Triton's kernels; skip if they cannot run, and with ``interpreted`` also
    if they are compiled."""
    if interpreted and PLACE == "cuda":
        pytest.skip("Triton compiles its kernels for the GPU here")
    pytest.importorskip("triton", reason="Triton is not installed; it comes with the extra kernels")
    from triton import language as tl
    from triton.runtime.interpreter import InterpretedFunction

    from calibration.devices import triton_kernels

    if PLACE == "cpu":
        if not isinstance(tl.sum, InterpretedFunction):
            pytest.skip("Triton was imported before its interpreter was asked for")
        _convert_bf16()
    return triton_kernels


def _convert_bf16() -> None:
    """Triton's interpreter (3.9) multiplies the bits of bf16 as whole numbers; here it converts
    them first."""
    from triton import language as tl
    from triton.runtime.interpreter import InterpreterBuilder as Builder

    given = Builder.create_dot
    if given.__name__ != "create_dot":
        return

    def converted(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        if a.dtype.scalar == tl.bfloat16:
            a, b = self.cast_impl(a, tl.float32), self.cast_impl(b, tl.float32)
        return given(self, a, b, *rest)

    Builder.create_dot = converted
