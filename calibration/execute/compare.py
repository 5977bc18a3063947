"""A decoder really executed, dense and pruned by every family: what predictions of whole passes are compared with.

:func:`compare` times each pruned decoder in turns with the dense one, so that a machine that slows down slows both, and
keeps every result in a run folder; :mod:`calibration.execute.comparison` puts predictions and bounds beside them and
says how well they agree. :mod:`calibration.execute.decoder` and torch are imported only when a decoder is run.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from calibration.devices.protocol import Device, Unsupported
from calibration.execute.cases import Case
from calibration.execute.comparison import OK, name_of
from calibration.execute.runs import check_folder
from calibration.measure.interrupt import Interrupt
from calibration.measure.plan import check_budget
from calibration.records.store import Header, Store, read_store
from simulator.errors import InputError
from simulator.models.config import ModelConfig

if TYPE_CHECKING:
    from calibration.execute.decoder import Decoder

STORE = "decoder.jsonl"
LONGEST_S = 30.0
"""Time for the pairs of one case, whatever the budget."""

UNSUPPORTED, SKIPPED, FAILED = "unsupported", "skipped", "failed"
_FAILURES_IN_A_ROW = 3
DTYPES: tuple[str, ...] = ("fp32", "bf16", "fp16")
"""Number formats a decoder runs in."""


def as_executed(device: str) -> dict[str, dict[str, Any]]:
    """Options of families for what torch runs: it has no kernel that skips tiles, and a grouped one on GPUs only.

    >>> as_executed("cpu")
    {'dynamic_width': {'kernel': 'looped'}}
    """
    return {"dynamic_width": {"kernel": "grouped" if device.startswith("cuda") else "looped"}}


@dataclass(frozen=True)
class Compared:
    """What :func:`compare` did: records in the folder, cases not reached in the time, and why others have no time."""

    records: tuple[dict[str, Any], ...]
    left: int
    notes: tuple[str, ...]
    stopped: str = ""


def compare(
    folder: str | Path,
    device: Device,
    config: ModelConfig,
    cases: Sequence[Case],
    *,
    budget_s: float,
    dtype: str = "bf16",
    runtime: str = "",
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> Compared:
    """Run and time a decoder in every case, into a run folder, new or begun by an earlier run of the same device.

    The device is open, and left open; the cases were lowered from ``config`` and share the budget equally: those that
    time is too short for are left for the next run.

    Parameters
    ----------
    runtime : {"", "cuda_graph", "eager"}
        How decode steps are launched; a graph where the device and the family can if left out.
    seed : int
        Of the weights, and of the order of the cases.
    progress : callable, optional
        Called with seconds spent and seconds in all.

    Raises
    ------
    InputError
        For a budget of zero, a device without torch, a number format or a model the decoder cannot run, a folder of
        another device.
    """
    path = check_folder(folder)
    check_budget(budget_s)
    if dtype not in DTYPES or dtype not in device.dtypes():
        known = ", ".join(d for d in DTYPES if d in device.dtypes())
        raise InputError(f"--dtype {dtype}: a decoder on {device.name} runs in {known}")
    if not device.name.startswith(("cpu", "cuda")):
        raise InputError(f"device {device.name!r}: a decoder needs one that runs torch: cpu or cuda")
    from calibration.execute.decoder.model import check_model

    check_model(config)
    description = device.describe()
    extra = {"opened": device.name, "model": config.name}
    header = Header(description.device, dict(description.stack), dtype, extra=extra)
    file = path / STORE
    if file.exists() and file.stat().st_size:
        read_store(file).header.refuse_other(header, str(file))
    path.mkdir(exist_ok=True)
    start, stopped, failures = device.clock(), "", 0
    with Store(file, header) as store, Interrupt() as interrupt:
        done = {str(row["key"]) for row in store.rows if row.get("status") in (OK, UNSUPPORTED)}
        todo = _shuffled([case for case in cases if name_of(case, dtype) not in done], seed)
        left = len(todo)
        executor = _Executor(device, _dense(config, dtype, device.name, seed), runtime) if todo else None
        for case in todo:
            spent = device.clock() - start
            if interrupt.asked or spent >= budget_s:
                stopped = "interrupted" if interrupt.asked else "budget"
                break
            assert executor is not None
            # building a pruned decoder takes its share too: what a case does not use goes to those after it
            record = executor.record(case, (budget_s - spent) / left)
            name = name_of(case, dtype)
            store.append({"type": "decoder", "key": name, "dtype": dtype, **_identity(case), **record})
            left -= 1
            failures = failures + 1 if record["status"] == FAILED else 0
            if failures >= _FAILURES_IN_A_ROW:
                stopped = f"device lost: {failures} cases in a row failed; the last: {record['reason']}"
                break
            if progress is not None:
                progress(round(device.clock() - start), round(budget_s))
        wanted = {name_of(case, dtype) for case in cases}
        found = {str(row["key"]): row for row in store.rows if row.get("key") in wanted}
    notes = dict.fromkeys(
        f"{r['family']} at {r['sparsity']:g} in {r['phase']}: {r['status']}: {r['reason']}"
        for r in found.values()
        if r["status"] != OK
    )
    return Compared(tuple(found.values()), left, tuple(notes), stopped)


def _dense(config: ModelConfig, dtype: str, place: str, seed: int) -> Decoder:
    from calibration.devices.operators import is_out_of_memory
    from calibration.execute.decoder import random_decoder

    try:
        return random_decoder(config, dtype=dtype, place=place, seed=seed)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise InputError(
            f"{config.name} in {dtype} does not fit on {place}; --layers N takes its first N layers"
        ) from None


def _shuffled(cases: Sequence[Case], seed: int) -> list[Case]:
    """Pruned decoders in random order, so that drift falls on none in particular; cases of one stay together."""
    kinds = list(dict.fromkeys((case.family, case.sparsity) for case in cases))
    turn = {kinds[i]: place for place, i in enumerate(np.random.default_rng(seed).permutation(len(kinds)))}
    return sorted(cases, key=lambda case: turn[case.family, case.sparsity])


def _identity(case: Case) -> dict[str, Any]:
    where = {"phase": case.phase, "batch": case.batch, "seq": case.seq}
    return {"model": case.dense.meta.model, "family": case.family, "sparsity": case.sparsity, **where}


class _Executor:
    """Times cases in turns with the dense decoder; one that cannot run ends as a record with the reason."""

    def __init__(self, device: Device, dense: Decoder, runtime: str) -> None:
        self.device, self.dense, self.runtime = device, dense, runtime
        self.kept: dict[tuple[str, float], Decoder] = {}  # the one pruned decoder that was made last

    def record(self, case: Case, seconds: float) -> dict[str, Any]:
        from calibration.devices.operators import is_out_of_memory

        try:
            return {"status": OK, "reason": "", **self._timed(case, self.device.clock() + seconds)}
        except (Unsupported, InputError) as error:
            return {"status": UNSUPPORTED, "reason": str(error)}
        except Exception as error:  # a kernel may raise anything; one family must not end the comparison
            status = SKIPPED if is_out_of_memory(error) else FAILED
            return {"status": status, "reason": f"{type(error).__name__}: {error}".splitlines()[0]}

    def _timed(self, case: Case, end: float) -> dict[str, Any]:
        from calibration.devices.operators import is_out_of_memory
        from calibration.execute.decoder.timing import PairTimes, time_pair

        pruned = self._pruned(case)
        # the first passes and the cache take their part too
        limit = min(max(0.6 * (end - self.device.clock()), 0.0), LONGEST_S)

        def timed(how: str) -> PairTimes:
            where: dict[str, Any] = {"batch": case.batch, "seq": case.seq, "phase": case.phase}
            return time_pair(self.dense, pruned, **where, runtime=how, time_limit_s=limit)

        runtime = self._runtime(case, pruned)
        try:
            times = timed(runtime)
        except RuntimeError as error:
            if runtime != "cuda_graph" or self.runtime or is_out_of_memory(error):
                raise
            runtime = "eager"  # what a graph cannot hold is launched one by one
            times = timed(runtime)
        samples = {"dense_s": list(times.first_s), "pruned_s": list(times.second_s)}
        return {"runtime": runtime, "loops": times.loops, **samples}

    def _pruned(self, case: Case) -> Decoder:
        from calibration.execute.decoder import prune_decoder

        which = (case.family, case.sparsity)
        if which not in self.kept:
            self.kept.clear()  # before the next one is made: two large models may fit, three not
            self.kept[which] = prune_decoder(self.dense, *which)
        return self.kept[which]

    def _runtime(self, case: Case, pruned: Decoder) -> str:
        if case.phase != "decode":
            return "eager"
        graph = pruned.place.startswith("cuda") and not (pruned.rule and pruned.rule.on_host)
        return self.runtime or ("cuda_graph" if graph else "eager")
