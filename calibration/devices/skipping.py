"""Select the code that skips work on a device: :mod:`calibration.devices.triton_kernels`, or loops in torch."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch

Tensor = Any


def in_triton(device: str) -> bool:
    """Whether a torch device runs Triton kernels: a CUDA GPU with Triton installed."""
    return device.startswith("cuda") and find_spec("triton") is not None


def kernels() -> Any:
    """Return the module of the kernels, which needs Triton."""
    return import_module("calibration.devices.triton_kernels")


def grouped_by_loops(x: Tensor, mask: Tensor, n: int, outer: bool) -> Callable[[Tensor], Tensor]:
    """Return a function of a weight: x (m, k) times the groups that each token uses, by a gather, a GEMM and a scatter.

    The groups are rows of the weight: output features (n, k) if ``outer``, else input features (k, n). The host reads
    the mask once, here.
    """
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
