"""The machine at hand as a device: its first CUDA GPU where torch sees one, else its CPU."""

from __future__ import annotations

from typing import Any

from calibration.devices.protocol import Device, unknown_device
from simulator.errors import InputError


def open_named(rest: str, **options: Any) -> Device:
    """The device ``host``, of which there is one; opened, it is named as what it is."""
    from calibration.devices import open_device

    if rest:
        raise unknown_device(f"host:{rest}")
    try:
        return open_device("cuda", **options)
    except InputError:  # no GPU, or no torch: then the CPU says so
        return open_device("cpu", **options)
