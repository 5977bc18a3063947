"""Memory: does a workload, dense or pruned, fit on a device?

Use :func:`memory`. Counted from the workload's columns, for the device that holds most:

- weights: parameters x bytes of their format; 2:4 weights compressed, with their indices. Scattered zeros are stored, as dense kernels
  need. Scales of quantised weights are left out (a 16-bit scale for 128 weights adds 3 % to 4-bit ones).
- cache: keys and values of the longest length a layer reaches, no more than its sliding window.
- activations: two tensors of the residual stream, and the larger of q, k, v and the attention's output, of gate, up and their product,
  and of the logits. One forward pass without chunks; an allocator's fragmentation is not in it.
- a reserve for what no tensor shows: :data:`RESERVE_BYTES`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from simulator.kernels import stack as stack_memory
from simulator.kernels.stack import F, Stack
from simulator.workload import Kind, Part, Workload  # noqa: F401 (for the doctests)

if TYPE_CHECKING:
    from simulator.hardware.profile import HardwareProfile

RESERVE_BYTES = 1e9
"""Set aside for CUDA context, library workspaces and framework. A stated default, not a measurement: change it by ``reserve_bytes``."""

GIB = 2.0**30

MOST_DEVICES = 1024
"""Where the search for a number of devices that is enough ends."""


@dataclass(frozen=True)
class Memory:
    """Bytes on the device that holds most, and the verdict.

    Attributes
    ----------
    weights_bytes, cache_bytes, activation_bytes, reserve_bytes, total_bytes, capacity_bytes : float, bytes
    fits : bool
        Whether the total is within the capacity.
    devices_needed : int
        Smallest power of two of such devices that share weights and cache evenly and fit (0: none up to :data:`MOST_DEVICES`).
    verdict : str
        One sentence for people.
    """

    weights_bytes: float
    cache_bytes: float
    activation_bytes: float
    reserve_bytes: float
    total_bytes: float
    capacity_bytes: float
    fits: bool
    devices_needed: int
    verdict: str


def memory(workload: Workload, hw: HardwareProfile, *, reserve_bytes: float = RESERVE_BYTES) -> Memory:
    """Memory of a workload on a device.

    Parameters
    ----------
    workload : Workload
        From :func:`simulator.lower`, pruned or not.
    hw : HardwareProfile
        Only its ``memory_bytes`` is read.
    reserve_bytes : float, bytes
        Set aside on each device.

    Examples
    --------
    >>> import simulator
    >>> w = simulator.lower(simulator.load_model("llama-2-70b"), phase="decode", seq=2048)
    >>> from types import SimpleNamespace
    >>> print(memory(w, SimpleNamespace(memory_bytes=80e9)).verdict)
    does not fit: needs 130.0 GiB of 74.5 GiB (1.7x); fits on 2 devices
    """
    devices = workload.meta.devices
    weights, cache, activation = weights_bytes(workload), cache_bytes(workload), activation_bytes(workload)
    total, capacity = weights + cache + activation + reserve_bytes, float(hw.memory_bytes)
    # what the devices share; a pipeline's fullest stage holds more than its even share, so this never promises too much there
    shared, whole = (weights + cache) * devices, activation + reserve_bytes
    sizes = (2**i for i in range(int(math.log2(MOST_DEVICES)) + 1))
    needed = (
        devices if total <= capacity else next((n for n in sizes if n > devices and shared / n + whole <= capacity), 0)
    )
    return Memory(
        weights,
        cache,
        activation,
        reserve_bytes,
        total,
        capacity,
        total <= capacity,
        needed,
        _verdict(total, capacity, devices, needed),
    )


def _verdict(total: float, capacity: float, devices: int, needed: int) -> str:
    each = " each" if devices > 1 else ""
    if total <= capacity:
        return f"fits: {total / GIB:.1f} GiB of {capacity / GIB:.1f} GiB{each} ({total / capacity:.0%})"
    way = f"fits on {needed} devices" if needed else f"does not fit on {MOST_DEVICES} devices either"
    return (
        f"does not fit: needs {total / GIB:.1f} GiB of {capacity / GIB:.1f} GiB{each} ({total / capacity:.1f}x); {way}"
    )


def bytes_needed(stack: Stack, *, reserve_bytes: float = RESERVE_BYTES) -> F:
    """Bytes each workload of a stack needs on the device that holds most: ``memory(...).total_bytes`` of many at once."""
    out: F = (
        stack_memory.weights_bytes(stack)
        + stack_memory.cache_bytes(stack)
        + stack_memory.activation_bytes(stack)
        + reserve_bytes
    )
    return out


def weights_bytes(w: Workload) -> float:
    """Bytes of the parameters on the device that holds most.

    >>> row = {"role": "q", "m": 1, "n": 4, "k": 8, "params": 32, "count": 3}
    >>> weights_bytes(Workload.from_rows([row]))
    192.0
    """
    return float(stack_memory.weights_bytes(Stack.of([w]))[0])


def cache_bytes(w: Workload) -> float:
    """Bytes of keys and values at the longest length each layer reaches, on the device that holds most.

    >>> row = {"kind": Kind.DECODE_ATTENTION, "role": "attention", "batch": 2, "q_len": 1, "kv_heads": 4, "head_dim": 8, "layers": 3}
    >>> cache_bytes(Workload.from_rows([row | {"kv_len": 10}, row | {"kv_len": 11}]))
    8448.0
    """
    return float(stack_memory.cache_bytes(Stack.of([w]))[0])


def activation_bytes(w: Workload) -> float:
    """Peak bytes of activations in one forward pass (the model is in the module's text); for rows of several widths, the widest.

    >>> up, down = ({"role": r, "part": Part.MLP, "m": 10, "n": n, "k": k} for r, n, k in (("up", 64, 8), ("down", 8, 64)))
    >>> activation_bytes(Workload.from_rows([up, down]))
    2880.0
    """
    return float(stack_memory.activation_bytes(Stack.of([w]))[0])
