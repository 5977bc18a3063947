"""Select the code of an operator on a device: Triton kernels that skip or fuse work, or a composite in torch."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from os import environ
from shutil import which
from typing import Any

import torch

Tensor = Any


def triton_needs() -> str:
    """Return what this machine lacks to run Triton kernels on a GPU, or "". Triton compiles a launcher in C."""
    if find_spec("triton") is None:
        return "Triton (extra kernels)"
    if environ.get("TRITON_INTERPRET") == "1" or environ.get("CC") or which("gcc") or which("clang"):
        return ""
    return "a C compiler (gcc or clang, or CC) for Triton's launcher"


def in_triton(device: str) -> bool:
    """Whether a torch device runs Triton kernels: a CUDA GPU with Triton installed and a C compiler."""
    return device.startswith("cuda") and not triton_needs()


def kernels() -> Any:
    return import_module("calibration.devices.triton_kernels")


def grouped_by_loops(x: Tensor, mask: Tensor, n: int, outer: bool) -> Callable[[Tensor], Tensor]:
    """Return x (m, k) times the groups of a weight that each token uses, by a gather, a GEMM and a scatter."""
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
