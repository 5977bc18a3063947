"""Devices to measure: one file per device, opened by its name."""

from __future__ import annotations

from importlib import import_module
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


DEVICES = ("cpu", "cuda", "replay")


def open_device(name: str, threads: int | None = None, **options: Any) -> Device:
    """Open the device ``NAME:REST``: ``open_named(REST, **options)`` of the module NAME, one of
    :data:`DEVICES`. ``threads`` is the number of threads of a CPU (default: ``OMP_NUM_THREADS``,
    else all CPUs of this process)."""
    if threads is not None:
        if name != "cpu":
            raise InputError(f"threads: expected device cpu with a number of threads, got {name}")
        options["threads"] = threads
    kind, _, rest = name.partition(":")
    if kind not in DEVICES:
        raise unknown_device(name)
    try:
        module = import_module(f"{__name__}.{kind}")
    except ModuleNotFoundError as error:
        if error.name != "torch":
            raise
        raise InputError(
            f"device {name!r} needs torch, which is not installed; try: pip install torch"
        ) from None
    opened: Device = module.open_named(rest, **options)
    return opened
