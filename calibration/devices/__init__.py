"""Devices to measure: one file each, opened by name.

``open_device("cpu")``, ``open_device("cuda")`` or ``open_device("cuda:1")``, ``open_device("replay:records.jsonl")``.
Importing this package needs neither torch nor NVML; the file of the device does.
"""

from __future__ import annotations

from typing import Any

from calibration.devices.protocol import Device, DeviceLost, Operator, OutOfMemory, Unsupported
from simulator.errors import InputError, unknown

__all__ = ["Device", "DeviceLost", "Operator", "OutOfMemory", "Unsupported", "open_device"]


def open_device(name: str, **options: Any) -> Device:
    """Open a device by name: ``cpu``, ``cuda`` or ``cuda:INDEX``, ``replay:FILE`` with records to be played back.

    Options are the device's own (``threads`` for the CPU). InputError: no such device, or torch is missing.
    """
    kind, _, rest = name.partition(":")
    if kind not in ("cpu", "cuda", "replay") or (kind == "cpu" and rest):
        raise unknown("device", name, ("cpu", "cuda", "cuda:0", "replay:FILE"))
    if kind == "replay":
        from calibration.devices.replay import ReplayDevice

        if not rest:
            raise InputError("device 'replay' needs a file of records; write replay:FILE")
        return ReplayDevice.from_file(rest, **options)
    if kind == "cuda" and rest and not rest.isdecimal():
        raise InputError(f"device {name!r}: expected cuda or cuda:INDEX with a whole number")
    try:
        if kind == "cpu":
            from calibration.devices.cpu import CpuDevice

            return CpuDevice(**options)
        from calibration.devices.cuda import CudaDevice

        return CudaDevice(int(rest or 0), **options)
    except ModuleNotFoundError as error:
        if error.name != "torch":
            raise
        raise InputError(f"device {name!r} needs torch, which is not installed; try: pip install torch") from None
