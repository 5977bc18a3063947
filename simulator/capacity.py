"""Compute the memory of workloads on the fullest device, and whether they fit:

- weights: parameters x bytes of their format; 2:4 weights are compressed, with indices. Scattered
  zeros are stored, as dense kernels need. Scales of quantised weights are excluded (a 16-bit scale
  per 128 weights adds 3 % to 4 bits).
- cache: keys and values of the longest length of each layer, at most its sliding window; recurrent
  states and the last positions of convolutions have one size. In a steady state (serve), sequences
  have the length of their decode steps, after eviction; only prompts of the current prefill hold
  all positions. A cached prefix is stored once, unless positions are evicted.
- activations: two tensors of the residual stream, and the largest of three sets of tensors:
  attention (q, k, v, output), MLP (gate, up, product; routed experts also gathered tokens), and
  logits.
- a reserve for memory outside tensors: :data:`RESERVE_BYTES`, and what the engine leaves unused
  (:class:`DeviceMemory`).

The rule is the same for all phases and commands. Caches consist of whole blocks of the engine.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from simulator.arguments import AMOUNT, SHARE, instance, number
from simulator.arrays import BoolArray, FloatArray, IndexArray
from simulator.codes import DTYPE_BYTES, GEMM, ROLES, Part, Phase
from simulator.display import Displayed
from simulator.engines.engine import Engine, load_engine
from simulator.hardware.library import load_hardware
from simulator.operators import BY_CODE
from simulator.operators.base import Rows
from simulator.workload import Workload, WorkloadBatch

if TYPE_CHECKING:
    from simulator.hardware.profile import HardwareProfile

RESERVE_BYTES = 1e9
"""Memory of CUDA context, library workspaces and framework: an assumed default, not a
measurement."""

_MIB = 2.0**20
_STATIC = (512 * _MIB, 1.5 * _MIB, 2 * 256 * _MIB, 10 * 1024 * _MIB)
"""Memory that SGLang keeps outside of weights and cache, bytes: for metadata, per token of a
prefill, for CUDA graphs (2 MiB per sequence of the largest), and the least of all (SGLang pull
request 10975)."""

MOST_DEVICES = 1024
"""Largest number of devices to try."""

_QKV, _WIDE = (
    [ROLES.index(name) for name in names.split()]
    for names in ("q k v qkv q_b kv_b delta_in mamba_in conv_in", "gate up gate_up")
)
_O, _DOWN, _HEAD = (ROLES.index(name) for name in ("o", "down", "lm_head"))


@dataclass(frozen=True)
class DeviceMemory:
    """Memory of a device that an engine uses. Fields may be arrays, one entry per workload.

    What the share means depends on the engine (:attr:`simulator.engines.engine.Schedule.share_of`):
    weights, activations and cache are a part of the "device"; the cache is a part of what they
    leave "free"; or weights and cache are a part of the device ("static"), and activations must fit
    into the rest.
    """

    memory_bytes: Any
    share: Any
    share_of: str = "device"
    reserve_bytes: float = RESERVE_BYTES

    @classmethod
    def of(cls, engine: Engine, hw: HardwareProfile, tokens: int | None = None) -> DeviceMemory:
        """Return the memory of an engine with its default share; ``tokens``: most tokens of a step,
        by default those of the engine."""
        share, limit = engine.memory.value, engine.limit(hw.memory_bytes, hw.name)
        share_of = engine.schedule.share_of if engine.schedule else "device"
        if share_of == "static" and limit is not None:
            fixed, each, graphs, least = _STATIC
            outside = max(fixed + each * (tokens or limit.tokens) + graphs, least)
            share = max(1.0 - outside / hw.memory_bytes, 0.0)
        return cls(float(hw.memory_bytes), share, share_of)

    @classmethod
    def each(
        cls, engine: Engine, hardware: Sequence[HardwareProfile], device: IndexArray
    ) -> DeviceMemory:
        """Return the memory of devices by index."""
        every = [cls.of(engine, hw) for hw in hardware]
        memory, share = np.array([(one.memory_bytes, one.share) for one in every]).T
        return cls(memory[device], share[device], every[0].share_of)

    @property
    def capacity_bytes(self) -> Any:
        return self.share * self.memory_bytes if self.share_of == "device" else self.memory_bytes

    @property
    def per_cache_byte(self) -> Any:
        """Bytes of free memory that a byte of the cache needs."""
        return 1.0 / self.share if self.share_of == "free" else 1.0

    def outside(self, activations: Any) -> Any:
        """Return the bytes outside of weights, cache and activations."""
        if self.share_of != "static":
            return self.reserve_bytes
        return np.maximum(self.reserve_bytes, (1.0 - self.share) * self.memory_bytes - activations)

    def needed(self, weights: Any, cache: Any, activations: Any) -> Any:
        """Return the bytes that fit if they are at most ``capacity_bytes``."""
        return weights + cache * self.per_cache_byte + activations + self.outside(activations)

    def for_cache(self, weights: Any, activations: Any) -> Any:
        """Return the bytes that weights and activations leave to the cache."""
        left = self.capacity_bytes - self.needed(weights, 0.0, activations)
        return np.maximum(left, 0.0) / self.per_cache_byte


@dataclass(frozen=True, repr=False)
class Memory(Displayed):
    """Bytes on the fullest device, and the verdict."""

    weights_bytes: float
    cache_bytes: float
    activation_bytes: float
    reserve_bytes: float
    total_bytes: float
    capacity_bytes: float
    fits: bool
    # smallest power of two that fits, with equal shares; 0: none up to MOST_DEVICES
    devices_needed: int
    verdict: str  # one sentence

    def _title(self) -> str:
        return self.verdict


def memory(
    workload: Workload,
    hw: str | HardwareProfile,
    *,
    reserve_bytes: float = RESERVE_BYTES,
    share: float | None = None,
) -> Memory:
    """Return the memory that a workload needs on a device.

    Parameters
    ----------
    workload : Workload
        The workload, from :func:`simulator.lower`.
    hw : str or HardwareProfile
        The device: a name, or a profile from :func:`simulator.load_hardware`.
    reserve_bytes : float
        Memory that other uses take, bytes.
    share : float, optional
        Share of the device's memory that may be used, in [0, 1]. Default: that of the engine.

    Returns
    -------
    Memory
        Bytes by use on the fullest device, and whether they fit; a model that is too large raises
        no error.

    Raises
    ------
    InputError
        If an argument has the wrong type or is out of range.

    Examples
    --------
    >>> import simulator
    >>> w = simulator.lower(simulator.load_model("llama-2-70b"), phase="decode", seq=2048)
    >>> print(memory(w, "h100").verdict)
    does not fit: needs 130.0 GiB, 71.7 GiB available (1.8x); fits on 2 devices
    """
    instance("workload", workload, Workload, "simulator.lower")
    number("reserve_bytes", reserve_bytes, AMOUNT)
    hw = load_hardware(hw)
    room = DeviceMemory.of(load_engine(workload.meta.engine), hw)
    if share is not None:
        room = DeviceMemory(room.memory_bytes, number("share", share, SHARE))
    room = replace(room, reserve_bytes=reserve_bytes)
    workloads, devices = WorkloadBatch.of([workload]), workload.meta.devices
    capacity = float(room.capacity_bytes)
    weights, cache = float(weights_bytes(workloads)[0]), float(cache_bytes(workloads)[0])
    activation = float(activation_bytes(workloads)[0])
    total = float(room.needed(weights, cache, activation))
    needed = devices
    if total > capacity:

        def fit(size: int) -> bool:
            """Return whether equal shares fit; those of a pipeline's fullest stage are larger."""
            part = devices / size
            return bool(room.needed(weights * part, cache * part, activation) <= capacity)

        sizes = (2**i for i in range(MOST_DEVICES.bit_length()) if 2**i > devices)
        needed = next((size for size in sizes if fit(size)), 0)
    return Memory(
        weights_bytes=weights,
        cache_bytes=cache,
        activation_bytes=activation,
        reserve_bytes=total - weights - cache - activation,
        total_bytes=total,
        capacity_bytes=capacity,
        fits=total <= capacity,
        devices_needed=needed,
        verdict=_verdict(total, capacity, devices, needed),
    )


def _verdict(total: float, capacity: float, devices: int, needed: int) -> str:
    need = f"{total / 2**30:.1f} GiB"
    have = f"{capacity / 2**30:.1f} GiB{' each' if devices > 1 else ''}"
    if total <= capacity:
        return f"fits: {need} of {have} ({total / capacity:.0%})"
    way = (
        f"fits on {needed} devices" if needed else f"does not fit on {MOST_DEVICES} devices either"
    )
    return f"does not fit: needs {need}, {have} available ({total / capacity:.1f}x); {way}"


def weights_bytes(workloads: WorkloadBatch) -> FloatArray:
    w = workloads.rows
    each = workloads.rows.each(lambda operator, rows: operator.parameter_bytes(rows))
    stored = np.where(w.params > 0, each * w.count, 0.0)
    if w.meta.parallel != "pipeline":
        return workloads.total(stored)
    inside, head = w.layers > 0, (w.part == Part.HEAD) & (w.layers <= 0)
    # the last stage has a copy of the embedding
    tied = np.where(head & (w.params == 0), w.weight_bytes_each, 0.0)
    first = workloads.total(np.where(~inside & ~head, stored, 0.0))
    last = workloads.total(np.where(head, stored, 0.0)) + np.maximum(workloads.largest(tied), 0.0)
    return np.asarray(
        workloads.total(np.where(inside, stored, 0.0)) * _stage_share(workloads)
        + np.maximum(first, last)
    )


def cache_bytes(workloads: WorkloadBatch) -> FloatArray:
    """Return the bytes of keys, values and states of each workload at the longest length of each
    layer."""
    each, prompts = cache_parts(workloads)
    return each * workloads.sequences + prompts


def cache_parts(workloads: WorkloadBatch) -> tuple[FloatArray, FloatArray]:
    """Return the bytes of the cache per sequence of each workload, and the further bytes of prompts
    that are computed, which do not depend on the number of sequences."""
    w = workloads.rows
    every = w.is_cached
    if w.meta.phase != "serve":
        return _longest(workloads, every, workloads.sequences) / workloads.sequences, np.zeros(
            len(workloads)
        )
    decode = every & (w.phase == Phase.DECODE)
    held = _longest(workloads, decode, workloads.sequences) / workloads.sequences
    unshared = (
        _longest(workloads, decode, workloads.sequences, *_prefix(workloads)) / workloads.sequences
    )
    prefill = every & (w.phase == Phase.PREFILL)
    together = np.maximum(workloads.largest(np.where(prefill, w.batch, 0)), 0)
    prompts = _longest(workloads, prefill, together)
    # all sequences share one prefix
    return unshared, np.maximum(prompts - together * held, 0.0) + (held - unshared)


def _prefix(workloads: WorkloadBatch) -> tuple[FloatArray, FloatArray]:
    """Return the positions of a prompt of each workload, and how many of them the prefix cache
    holds."""
    w = workloads.rows
    prefill = w.phase == Phase.PREFILL
    prompt = workloads.largest(np.where(w.is_attention & prefill, w.kv_len, 0)).astype(np.float64)
    computed = (
        workloads.total(np.where(w.is_role("embedding") & prefill, w.m * w.count, 0.0))
        / workloads.sequences
    )
    return prompt, np.maximum(np.round(prompt - computed), 0.0)


def _longest(
    workloads: WorkloadBatch,
    rows: BoolArray,
    sequences: Any,
    prompt: Any = None,
    shared: Any = None,
) -> FloatArray:
    """Return the cache bytes of some rows of each workload for at least ``sequences`` (W,). Layers
    that keep the whole ``prompt`` (W,) exclude ``shared`` positions (W,)."""
    w, index = workloads.rows, rows.nonzero()[0]
    if not len(index):
        return np.zeros(len(workloads))
    kv, window = w.kv_len[index], w.window[index]
    if shared is not None:
        owner = workloads.owner[index]
        kv = np.where((window == 0) & (kv > prompt[owner]), kv - shared[owner], kv)
    schedule = load_engine(w.meta.engine).schedule
    block = schedule.block if schedule else 1
    kv = -(-kv // block) * block
    batch = np.maximum(w.batch[index], sequences[workloads.owner[index]])
    each, out = np.zeros(len(index)), np.zeros(len(workloads))
    for code in set(w.kind[index].tolist()):
        mine = (w.kind[index] == code).nonzero()[0]
        each[mine] = BY_CODE[code].cache_bytes(Rows(w, index[mine]), batch[mine], kv[mine])
    # a layer may have several: attention and an indexer, a state and a convolution
    kept = (w.role[index].astype(np.int64) * len(Part) + w.part[index]) * 2 + w.stage[index]
    for one in set(kept.tolist()):
        mine = (kept == one).nonzero()[0]
        out += _over_layers(workloads, index[mine], each[mine])
    return np.asarray(out * _stage_share(workloads) if w.meta.parallel == "pipeline" else out)


def _over_layers(workloads: WorkloadBatch, rows: IndexArray, each: FloatArray) -> FloatArray:
    """Return the sum over the layers of each workload of the largest value of a layer; ``each`` are
    the values of ``rows`` per layer. Generate has one decode row per length; the longest counts."""
    w = workloads.rows
    start = np.maximum(w.layer[rows], 0).astype(np.int64)
    size = np.maximum(w.layers[rows], 1).astype(np.int64)
    span = int((start + size).max()) + 1
    first = workloads.owner[rows] * span + start
    inside = np.arange(int(size.sum())) - np.repeat(np.cumsum(size) - size, size)
    layers = np.zeros(len(workloads) * span)  # owner x layer
    np.maximum.at(layers, np.repeat(first, size) + inside, np.repeat(each, size))
    return np.asarray(layers.reshape(len(workloads), span).sum(axis=1))


def activation_bytes(workloads: WorkloadBatch) -> FloatArray:
    return np.asarray(np.maximum.reduce([*activation_bytes_by_phase(workloads).values()]))


def activation_bytes_by_phase(workloads: WorkloadBatch) -> dict[Phase, FloatArray]:
    """Return the peak bytes of activations by phase; 0 for workloads without the phase."""
    masks = {phase: workloads.rows.phase == int(phase) for phase in Phase}
    return {
        phase: _activation_bytes(workloads, here)
        for phase, here in masks.items()
        if np.count_nonzero(here)
    }


def _activation_bytes(workloads: WorkloadBatch, here: BoolArray) -> FloatArray:
    w, size = workloads.rows, len(workloads)
    gemm = (w.kind == GEMM) & here
    element = np.maximum(workloads.largest(np.where(gemm, 2.0, DTYPE_BYTES[w.dtype])), 2.0)
    tokens, cell = w.m.astype(np.float64), workloads.owner * len(ROLES) + w.role

    def widest(width: Any, stage: int) -> FloatArray:
        """Return the largest tensor of each workload and role, except inner tensors of low-rank
        pairs."""
        most = np.zeros(size * len(ROLES))
        np.maximum.at(most, cell, np.where(gemm & (w.stage != stage), tokens * width, 0.0))
        return most.reshape(size, len(ROLES))

    def largest(role: str, column: Any) -> Any:
        mine = w.is_role(role) & here
        return (
            np.maximum(workloads.largest(np.where(mine, column, 0.0)), 0.0)
            if np.count_nonzero(mine)
            else 0.0
        )

    outer, inner = widest(w.n, 1), widest(w.k, 2)
    # the embedding has all tokens; layers may have fewer
    stream = np.maximum(largest("embedding", tokens * w.n), inner[:, _QKV + _WIDE].max(axis=1))
    attention = outer[:, _QKV].sum(axis=1) + inner[:, _O]
    mlp = outer[:, _WIDE].sum(axis=1) + inner[:, _DOWN]
    inside = np.where(
        here, workloads.rows.each(lambda operator, rows: operator.inner_elements(rows)), 0.0
    )
    widest_three = np.maximum(
        np.maximum(attention, np.maximum(mlp, workloads.largest(inside))), outer[:, _HEAD]
    )
    return np.asarray((2.0 * stream + widest_three) * element + largest("all_gather", w.read_bytes))


def _stage_share(workloads: WorkloadBatch) -> FloatArray:
    """Return the share of a workload's layers on the fullest stage of a pipeline; 1 without
    layers."""
    w = workloads.rows
    layers = np.maximum(workloads.largest(np.where(w.layers > 0, w.layer + w.layers, 0)), 0).astype(
        np.float64
    )
    return np.where(layers > 0, np.ceil(layers / w.meta.devices) / np.maximum(layers, 1.0), 1.0)
