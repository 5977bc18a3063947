"""Devices to measure: one file per device, opened by its name."""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
from typing import Any

from calibration.devices.protocol import (
    CaptureFailed,
    Device,
    DeviceLost,
    Operator,
    OutOfMemory,
    Unsupported,
    unknown_device,
)
from simulator.errors import InputError

__all__ = [
    "CaptureFailed",
    "Device",
    "DeviceLost",
    "Operator",
    "OutOfMemory",
    "Unsupported",
    "open_device",
]


def open_device(name: str, threads: int | None = None, **options: Any) -> Device:
    """Open the device ``NAME:REST``, which calls ``open_named(REST, **options)`` of the module
    NAME: ``cpu``, ``cuda:INDEX``, ``replay:planted``. ``threads`` is the number of threads of a CPU
    (default: ``OMP_NUM_THREADS``, else all CPUs of this process)."""
    if threads is not None:
        if name != "cpu":
            raise InputError(f"threads: expected device cpu with a number of threads, got {name}")
        options["threads"] = threads
    kind, _, rest = name.partition(":")
    if not kind.isidentifier() or find_spec(f"{__name__}.{kind}") is None:
        raise unknown_device(name)
    try:
        module = import_module(f"{__name__}.{kind}")
    except ModuleNotFoundError as error:
        if error.name == "triton":  # the module of its kernels is not a device
            raise unknown_device(name) from None
        if error.name != "torch":
            raise
        raise InputError(
            f"device {name!r} needs torch, which is not installed; try: pip install torch"
        ) from None
    if not hasattr(module, "open_named"):
        raise unknown_device(name)
    opened: Device = module.open_named(rest, **options)
    return opened
