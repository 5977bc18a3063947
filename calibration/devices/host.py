"""This machine as a device: its first CUDA GPU if torch finds one, else its CPU."""

from __future__ import annotations

from typing import Any

from calibration.devices.protocol import Device, unknown_device
from simulator.errors import InputError


def open_named(rest: str, **options: Any) -> Device:
    """Open the device ``host``; the opened device has its own name, ``cuda:0`` or ``cpu``."""
    from calibration.devices import open_device

    if rest:
        raise unknown_device(f"host:{rest}")
    try:
        return open_device("cuda", **options)
    except InputError:  # no GPU, or no torch; the CPU reports missing torch
        return open_device("cpu", **options)
