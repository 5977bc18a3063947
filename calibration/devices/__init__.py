"""Devices to measure: one file each, opened by its name. Only the file of a device needs torch or NVML."""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
from typing import Any

from calibration.devices.protocol import Device, DeviceLost, Operator, OutOfMemory, Unsupported, unknown_device
from simulator.errors import InputError

__all__ = ["Device", "DeviceLost", "Operator", "OutOfMemory", "Unsupported", "open_device"]


def open_device(name: str, **options: Any) -> Device:
    """Open a device by name: ``cpu``, ``cuda`` or ``cuda:INDEX``, ``host`` (the first GPU, else the CPU), or
    ``replay:FILE`` with records to be played back, or ``replay:planted`` with times by a formula.

    ``NAME:REST`` is what ``open_named(REST, **options)`` of this package's module NAME returns; options are the
    device's own (``threads`` for the CPU). InputError: no such device, or torch is missing.
    """
    kind, _, rest = name.partition(":")
    if not kind.isidentifier() or find_spec(f"{__name__}.{kind}") is None:
        raise unknown_device(name)
    try:
        module = import_module(f"{__name__}.{kind}")
    except ModuleNotFoundError as error:
        if error.name == "triton":  # its kernels are a module here, and no device
            raise unknown_device(name) from None
        if error.name != "torch":
            raise
        raise InputError(f"device {name!r} needs torch, which is not installed; try: pip install torch") from None
    if not hasattr(module, "open_named"):
        raise unknown_device(name)
    opened: Device = module.open_named(rest, **options)
    return opened
