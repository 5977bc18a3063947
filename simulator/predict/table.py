"""Many predictions at once: the product of devices, families, sparsities, phases, batches and lengths as plain records.

Use :func:`table` for a table of speedups, :func:`explanations` for the waterfalls of a few of them. A combination that a family
does not support (2:4 at 0.25) is left out with a note when several families were asked for, and refused when it was named alone.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from simulator.errors import InputError, unknown
from simulator.hardware.library import load_hardware
from simulator.kernels.stack import Stack, bytes_needed, memory
from simulator.models.config import ModelConfig
from simulator.models.library import load_model
from simulator.predict.settings import MAX_TOKENS, Setting, check_fraction, once, one_of, whole_number
from simulator.predict.speedup import Speedup, Step, pairs_of, speedups, waterfall
from simulator.pruning import FAMILIES, prune
from simulator.workload import PHASES, Workload

if TYPE_CHECKING:
    from simulator.hardware.profile import HardwareProfile
    from simulator.kernels.stack import Memory
    from simulator.predict.compare import Pairs


@dataclass(frozen=True)
class Record:
    """One prediction with everything that identifies it; the order of the fields is the order of keys in JSON and of columns in CSV."""

    model: str
    hardware: str
    family: str
    sparsity: float
    realised_sparsity: float
    phase: str
    batch: int
    seq: int
    dtype: str
    runtime: str
    dense_s: float
    pruned_s: float
    speedup: float
    speedup_lower: float
    speedup_upper: float
    flop_bound: float
    byte_bound: float
    roofline_bound: float
    limit: str
    # beyond the stable keys
    measured_bound: float | None
    efficiency: float
    limit_share: float
    level: float
    calibrated: bool
    new_tokens: int
    weight_dtype: str
    kv_dtype: str
    devices: int
    parallel: str
    ideal: bool
    dense_memory_bytes: float
    pruned_memory_bytes: float
    capacity_bytes: float
    dense_fits: bool
    pruned_fits: bool


@dataclass(frozen=True)
class Table:
    """Records, and what a person should know beside them (combinations left out, models that do not fit): one line each."""

    records: tuple[Record, ...]
    notes: tuple[str, ...]

    def __iter__(self) -> Iterator[Record]:
        return iter(self.records)

    def __len__(self) -> int:
        return len(self.records)


@dataclass(frozen=True)
class Explanation:
    """A prediction, its waterfall, and the GEMMs of the dense and the pruned model."""

    record: Record
    steps: tuple[Step, ...]
    dense: Workload = field(repr=False)
    pruned: Workload = field(repr=False)
    hardware: HardwareProfile = field(repr=False)


def families(names: Sequence[str]) -> tuple[str, ...]:
    """Names of families, ``all`` standing for every one, in the order asked for and once each.

    >>> families(["width", "depth", "width"])
    ('width', 'depth')
    """
    out: list[str] = []
    for name in names:
        if name != "all" and name not in FAMILIES:
            raise unknown("family", name, [*FAMILIES, "all"])
        out.extend(FAMILIES if name == "all" else [name])
    return tuple(dict.fromkeys(out))


def table(
    models: Sequence[str | ModelConfig],
    hardware: Sequence[str | HardwareProfile],
    family: Sequence[str] = ("all",),
    sparsity: Sequence[float] = (0.1, 0.25, 0.5),
    phase: Sequence[str] = ("prefill",),
    batch: Sequence[int] = (1,),
    seq: Sequence[int] = (2048,),
    *,
    setting: Setting | None = None,
    ideal: bool = False,
    options: Mapping[str, Any] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Table:
    """Speedups of every combination, each dense workload and its pruned versions timed in one vectorised pass a device.

    Parameters
    ----------
    models : sequence of str or ModelConfig
        Names, paths or loaded models.
    hardware : sequence of str or HardwareProfile
        Names, aliases, paths or loaded profiles; one named twice counts once.
    family : sequence of str
        Families of section "pruning", or ``all``.
    sparsity : sequence of float
        Fractions removed, each in [0, 1).
    phase : sequence of {"prefill", "decode", "generate"}
    batch, seq : sequence of int
        Sequences, and tokens (prefill) or cached positions (decode) of each; at least 1.
    setting : Setting, optional
        Number formats, runtime, devices.
    ideal : bool
        Leave out the work that pruning adds (routers, gathers).
    options : mapping, optional
        Further options of the one family asked for.
    progress : callable, optional
        Called with combinations done and their number.

    Returns
    -------
    Table
        Ordered by model, phase, batch, seq, family, sparsity, hardware.

    Raises
    ------
    InputError
        For bad values, and for a combination that the only family asked for does not support.

    Examples
    --------
    >>> found = table(["llama-3.1-8b"], ["h100_sxm"], ["depth", "semi_structured"], [0.25])
    >>> [(r.family, r.sparsity) for r in found]
    [('depth', 0.25)]
    >>> len(found.notes)
    1
    """
    chosen, fractions = families(family), once(check_fraction(s) for s in sparsity)
    phases, setting = once(one_of("phase", p, PHASES) for p in phase), setting or Setting()
    shapes = [(whole_number("batch", b), whole_number("seq", s)) for b, s in itertools.product(once(batch), once(seq))]
    devices = list({hw.name: hw for hw in (_profile(h) for h in hardware)}.values())
    loaded = [load_model(m) if isinstance(m, str) else m for m in models]
    for name, values in (
        ("model", loaded),
        ("hardware", devices),
        ("family", chosen),
        ("sparsity", fractions),
        ("phase", phases),
        ("shape", shapes),
    ):
        if not values:
            raise InputError(f"{name}: expected at least one")
    for b, s in shapes:
        if b * s > MAX_TOKENS and phases != ("decode",):
            raise InputError(f"batch {b} x seq {s}: expected at most {MAX_TOKENS} tokens in a pass")
    records: list[Record] = []
    notes: dict[str, list[float]] = {}
    unfit: dict[str, None] = {}  # in order, once each
    jobs = list(itertools.product(loaded, phases, shapes))
    done, total = 0, len(jobs) * len(devices)
    for model, p, (b, s) in jobs:
        dense = setting.lower(model, p, b, s)
        reached = s + dense.meta.new_tokens
        if reached > model.max_positions:
            unfit[
                f"{model.name} is made for {model.max_positions} positions, fewer than the {reached} asked for; timed as if it took them"
            ] = None
        pruned, asked = _prune_all(dense, chosen, fractions, ideal, options, notes)
        found: dict[tuple[int, int], Record] = {}
        pairs = pairs_of(dense, pruned)
        need, *needs = bytes_needed(pairs.stack).tolist()  # the same on every device
        for d, hw in enumerate(devices):
            if need > hw.memory_bytes:
                unfit[
                    f"{model.name} at {p}, batch {b}, seq {s} on {hw.name} {_too_large(memory(dense, hw))}; its times are hypothetical"
                ] = None
            for i, speed in _timed(dense, pruned, asked, pairs, hw, setting, len(chosen) == 1, notes):
                found[i, d] = _record(speed, dense, asked[i], hw, setting, ideal, (need, needs[i]))
            done += 1
            if progress is not None:
                progress(done, total)
        records.extend(found[key] for key in sorted(found))
    lines = [
        f"{reason}: left out at sparsity {', '.join(f'{s:g}' for s in sorted(set(at)))}" for reason, at in notes.items()
    ]
    if not records:
        raise InputError(lines[0] if lines else "nothing to predict")
    return Table(tuple(records), (*lines, *unfit))


def explanations(
    model: str | ModelConfig,
    hardware: Sequence[str | HardwareProfile],
    family: str,
    sparsity: float | Mapping[str, float],
    phase: Sequence[str] = ("prefill",),
    batch: Sequence[int] = (1,),
    seq: Sequence[int] = (2048,),
    *,
    setting: Setting | None = None,
    ideal: bool = False,
    options: Mapping[str, Any] | None = None,
) -> tuple[Explanation, ...]:
    """The loss waterfall of one family at one sparsity, for every device, phase, batch and length; see :func:`table`.

    ``sparsity`` may also be a mapping from projection kind to fraction.

    Examples
    --------
    >>> import math
    >>> (e,) = explanations("llama-3.1-8b", ["h100"], "width", 0.25)
    >>> bool(abs(math.prod(step.factor for step in e.steps) - e.record.speedup) < 1e-9)
    True
    """
    (name,), setting = families([family])[:1], setting or Setting()
    if family == "all":
        raise InputError("family 'all': expected one family to explain")
    fraction = (
        {kind: check_fraction(s) for kind, s in sparsity.items()}
        if isinstance(sparsity, Mapping)
        else check_fraction(sparsity)
    )
    config = load_model(model) if isinstance(model, str) else model
    devices = list({hw.name: hw for hw in (_profile(h) for h in hardware)}.values())
    out = []
    for p, b, s in itertools.product(once(phase), once(batch), once(seq)):
        dense = setting.lower(config, one_of("phase", p, PHASES), whole_number("batch", b), whole_number("seq", s))
        pruned = prune(dense, name, fraction, ideal=ideal, **(options or {}))
        for hw in devices:
            (speed,) = speedups(dense, [pruned], hw, setting.runtime, setting.level)
            asked = (name, speed.sparsity)
            need, needs = bytes_needed(Stack.of([dense, pruned])).tolist()
            record = _record(speed, dense, asked, hw, setting, ideal, (need, needs))
            out.append(Explanation(record, waterfall(dense, pruned, hw, setting.runtime), dense, pruned, hw))
    return tuple(out)


# -- parts ------------------------------------------------------------------------------------------------------------------------


def _prune_all(
    dense: Workload,
    chosen: Sequence[str],
    fractions: Sequence[float],
    ideal: bool,
    options: Mapping[str, Any] | None,
    notes: dict[str, list[float]],
) -> tuple[list[Workload], list[tuple[str, float]]]:
    """Pruned versions of a workload, and the family and sparsity of each; what is not supported goes to the notes."""
    pruned, asked = [], []
    for name, fraction in itertools.product(chosen, fractions):
        try:
            pruned.append(prune(dense, name, fraction, ideal=ideal, **(options or {})))
        except InputError as error:
            if len(chosen) == 1:
                raise
            reason = str(error).replace(f" at sparsity {fraction:g}", "")
            notes.setdefault(reason if name in reason else f"{name}: {reason}", []).append(fraction)
        else:
            asked.append((name, fraction))
    return pruned, asked


def _timed(
    dense: Workload,
    pruned: Sequence[Workload],
    asked: Sequence[tuple[str, float]],
    pairs: Pairs,
    hw: HardwareProfile,
    setting: Setting,
    strict: bool,
    notes: dict[str, list[float]],
) -> Iterator[tuple[int, Speedup]]:
    """Speedups on one device, with the index of each; a version the device cannot run (no sparse tensor cores) goes to the notes."""
    if not pruned:
        return
    try:
        yield from enumerate(speedups(dense, pruned, hw, setting.runtime, setting.level, pairs=pairs))
        return
    except InputError:
        if strict:
            raise
    speedups(dense, [], hw, setting.runtime, setting.level)  # the dense model must run
    for i, (workload, (name, fraction)) in enumerate(zip(pruned, asked)):
        try:
            yield i, speedups(dense, [workload], hw, setting.runtime, setting.level)[0]
        except InputError as error:
            notes.setdefault(f"{name} on {hw.name}: {error}", []).append(fraction)


def _record(
    speed: Speedup,
    dense: Workload,
    asked: tuple[str, float],
    hw: HardwareProfile,
    setting: Setting,
    ideal: bool,
    needs: tuple[float, float],
) -> Record:
    """A flat record of one prediction; ``needs`` are the bytes of the dense and the pruned model on a device."""
    meta, capacity = dense.meta, float(hw.memory_bytes)
    return Record(
        model=meta.model,
        hardware=hw.name,
        family=asked[0],
        sparsity=asked[1],
        realised_sparsity=speed.realised_sparsity,
        phase=meta.phase,
        batch=meta.batch,
        seq=meta.seq,
        dtype=setting.dtype,
        runtime=setting.runtime,
        dense_s=speed.dense_s,
        pruned_s=speed.pruned_s,
        speedup=speed.speedup,
        speedup_lower=speed.lower,
        speedup_upper=speed.upper,
        flop_bound=speed.flop_bound,
        byte_bound=speed.byte_bound,
        roofline_bound=speed.roofline_bound,
        limit=speed.limit,
        measured_bound=speed.measured_bound,
        efficiency=speed.efficiency,
        limit_share=speed.limit_share,
        level=speed.level,
        calibrated=speed.calibrated,
        new_tokens=meta.new_tokens,
        weight_dtype=setting.weight_dtype or setting.dtype,
        kv_dtype=setting.kv_dtype or setting.dtype,
        devices=setting.devices,
        parallel=setting.parallel if setting.devices > 1 else "none",
        ideal=ideal,
        dense_memory_bytes=needs[0],
        pruned_memory_bytes=needs[1],
        capacity_bytes=capacity,
        dense_fits=needs[0] <= capacity,
        pruned_fits=needs[1] <= capacity,
    )


def _too_large(m: Memory) -> str:
    """Why a model does not fit, and what would."""
    way = f"fits on {m.devices_needed} devices" if m.devices_needed else "no number of devices tried is enough"
    return f"needs {m.total_bytes / 2**30:.1f} GiB of {m.capacity_bytes / 2**30:.1f} GiB ({way})"


def _profile(hardware: str | HardwareProfile) -> HardwareProfile:
    return load_hardware(hardware) if isinstance(hardware, str) else hardware
