"""A decoder really executed, dense and pruned by every family: what predictions of whole passes are compared with.

:func:`compare` times each pruned decoder in turns with the dense one, so that a machine that slows down slows both, and keeps every result
in a run folder; :mod:`calibration.execute.comparison` puts predictions and bounds beside them and says how well they agree.
:mod:`calibration.execute.decoder` and torch are imported only when a decoder is run.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from calibration.devices.protocol import Device, OutOfMemory, Unsupported
from calibration.execute.comparison import OK, name_of
from calibration.execute.upper_bound import Case
from calibration.measure.interrupt import Interrupt
from calibration.measure.plan import check_budget
from calibration.execute.runs import check_folder
from calibration.records.store import Header, Store, read_store
from simulator.errors import InputError

if TYPE_CHECKING:
    from calibration.execute.decoder import Decoder
    from simulator.models.config import ModelConfig

STORE = "decoder.jsonl"
LONGEST_S = 30.0
"""Time for the pairs of one case, whatever the budget."""

UNSUPPORTED, SKIPPED, FAILED = "unsupported", "skipped", "failed"
_FAILURES_IN_A_ROW = 3
DTYPES: tuple[str, ...] = ("fp32", "bf16", "fp16")
"""Number formats a decoder runs in."""


def as_executed(device: str) -> dict[str, dict[str, Any]]:
    """Options of families that say what :mod:`calibration.execute.decoder` runs: torch has no kernel that skips tiles, and a grouped one on GPUs.

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

    Parameters
    ----------
    folder : str or Path
    device : Device
        Open, and left open; one that runs torch.
    config : ModelConfig
        What the cases were lowered from.
    cases : sequence of Case
    budget_s : float, s
        Shared equally among the cases; those that time is too short for are left for the next run.
    dtype : {"fp32", "bf16", "fp16"}
    runtime : {"", "cuda_graph", "eager"}
        How decode steps are launched; a graph where the device and the family can if left out.
    seed : int
        Of the weights, and of the order of the cases.
    progress : callable, optional
        Called with seconds spent and seconds in all.

    Raises
    ------
    InputError
        For a budget of zero, a device without torch, a number format or a model the decoder cannot run, a folder of another device.
    """
    path = check_folder(folder)
    check_budget(budget_s)
    if dtype not in DTYPES or dtype not in device.dtypes():
        raise InputError(
            f"--dtype {dtype}: a decoder on {device.name} runs in {', '.join(d for d in DTYPES if d in device.dtypes())}"
        )
    if not device.name.startswith(("cpu", "cuda")):
        raise InputError(f"device {device.name!r}: a decoder needs one that runs torch: cpu or cuda")
    from calibration.execute.decoder.model import check_model

    check_model(config)
    description = device.describe()
    header = Header(
        description.device, dict(description.stack), dtype, extra={"opened": device.name, "model": config.name}
    )
    file = path / STORE
    if file.exists() and file.stat().st_size:
        read_store(file).header.refuse_other(header, str(file))
    path.mkdir(exist_ok=True)
    start, stopped, failures = device.clock(), "", 0
    with Store(file, header) as store, Interrupt() as interrupt:
        done = {str(row["key"]) for row in store.rows if row.get("status") in (OK, UNSUPPORTED)}
        todo = [case for case in cases if name_of(case, dtype) not in done]
        todo = _shuffled(todo, seed)
        dense = _dense(config, dtype, device.name, seed) if todo else None
        left, kept = len(todo), dict[tuple[str, float], "Decoder"]()
        for number, case in enumerate(todo):
            spent = device.clock() - start
            if interrupt.asked:
                stopped = "interrupted"
                break
            if spent >= budget_s:
                stopped = "budget"
                break
            assert dense is not None
            # building a pruned decoder takes its share too: what a case does not use goes to those after it
            job = _Job(device, dense, (budget_s - spent) / (len(todo) - number), runtime, kept)
            record = job.record(case)
            store.append({"type": "decoder", "key": name_of(case, dtype), "dtype": dtype, **_identity(case), **record})
            left -= 1
            failures = failures + 1 if record["status"] == FAILED else 0
            if failures >= _FAILURES_IN_A_ROW:
                stopped = f"device lost: {failures} cases in a row failed; the last: {record['reason']}"
                break
            if progress is not None:
                progress(round(device.clock() - start), round(budget_s))
        wanted = {name_of(case, dtype) for case in cases}
        found = {str(row["key"]): row for row in store.rows if row.get("key") in wanted}
    notes = tuple(
        dict.fromkeys(
            f"{r['family']} at {r['sparsity']:g} in {r['phase']}: {r['status']}: {r['reason']}"
            for r in found.values()
            if r["status"] != OK
        )
    )
    return Compared(tuple(found.values()), left, notes, stopped)


def _dense(config: ModelConfig, dtype: str, place: str, seed: int) -> Decoder:
    from calibration.execute.decoder import random_decoder

    try:
        return random_decoder(config, dtype=dtype, place=place, seed=seed)
    except (RuntimeError, MemoryError) as error:
        if not _out_of_memory(error):
            raise
        raise InputError(
            f"{config.name} in {dtype} does not fit on {place}; --layers N takes its first N layers"
        ) from None


def _shuffled(cases: Sequence[Case], seed: int) -> list[Case]:
    """Families and sparsities in random order, so that drift falls on none in particular; cases of one pruned decoder stay together."""
    kinds = list(dict.fromkeys((case.family, case.sparsity) for case in cases))
    turn = {kinds[i]: place for place, i in enumerate(np.random.default_rng(seed).permutation(len(kinds)))}
    return sorted(cases, key=lambda case: turn[case.family, case.sparsity])


def _identity(case: Case) -> dict[str, Any]:
    where = {"phase": case.phase, "batch": case.batch, "seq": case.seq}
    return {"model": case.dense.meta.model, "family": case.family, "sparsity": case.sparsity, **where}


@dataclass(frozen=True)
class _Job:
    """Times a case in turns with the dense decoder; one that cannot run ends as a record with the reason."""

    device: Device
    dense: Decoder
    seconds: float
    runtime: str
    kept: dict[tuple[str, float], Decoder]  # the one pruned decoder that was made last

    def record(self, case: Case) -> dict[str, Any]:
        begin = self.device.clock()
        try:
            return {"status": OK, "reason": "", **self._timed(case, begin)}
        except (Unsupported, InputError) as error:
            return {"status": UNSUPPORTED, "reason": str(error)}
        except Exception as error:  # a kernel may raise anything; one family must not end the comparison
            return {
                "status": SKIPPED if _out_of_memory(error) else FAILED,
                "reason": f"{type(error).__name__}: {error}".splitlines()[0],
            }

    def _timed(self, case: Case, begin: float) -> dict[str, Any]:
        from calibration.execute.decoder import prune_decoder
        from calibration.execute.decoder.pairs import PairTimes, time_pair

        which = (case.family, case.sparsity)
        if which not in self.kept:
            self.kept.clear()  # before the next one is made: two large models may fit, three not
            self.kept[which] = prune_decoder(self.dense, *which)
        pruned = self.kept[which]
        left = self.seconds - (self.device.clock() - begin)
        limit = min(max(0.6 * left, 0.0), LONGEST_S)  # the first passes and the cache take their part too
        runtime = self.runtime if case.phase == "decode" and self.runtime else self._best(case)

        def timed(how: str) -> PairTimes:
            return time_pair(
                self.dense, pruned, batch=case.batch, seq=case.seq, phase=case.phase, runtime=how, time_limit_s=limit
            )

        try:
            times = timed(runtime)
        except RuntimeError as error:
            if runtime != "cuda_graph" or self.runtime or _out_of_memory(error):
                raise
            runtime = "eager"  # what a graph cannot hold is launched one by one
            times = timed(runtime)
        return {
            "runtime": runtime,
            "loops": times.loops,
            "dense_s": list(times.first_s),
            "pruned_s": list(times.second_s),
        }

    def _best(self, case: Case) -> str:
        graph = case.phase == "decode" and self.dense.place.startswith("cuda")
        return "cuda_graph" if graph and case.family not in ("dynamic_depth", "dynamic_width") else "eager"


def _out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out; torch says so in words on a CPU."""
    words = str(error).lower()
    return isinstance(error, OutOfMemory | MemoryError) or "out of memory" in words or "not enough memory" in words


def fewer_layers(config: ModelConfig, layers: int | None) -> ModelConfig:
    """A model cut to its first layers, where memory or time is short; itself when none are named.

    >>> from simulator.models.library import load_model
    >>> fewer_layers(load_model("llama-3.1-8b"), 4).layers
    4
    """
    if layers is None:
        return config
    if not 1 <= layers <= config.layers:
        raise InputError(f"--layers {layers}: {config.name} has 1 to {config.layers}")
    return replace(config, layers=layers, windows=config.windows[:layers])
