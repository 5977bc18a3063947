"""``prunesim measure``: time operators on a device into a run folder, or join the records of several machines."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from calibration.cli.rows import seconds
from simulator.cli import options, render
from simulator.cli.options import arg, opt
from simulator.errors import InputError

if TYPE_CHECKING:
    from calibration.measure.run import Outcome
    from calibration.runners.runs import Measured

# fmt: off
Devices = Annotated[list[str], arg("DEVICE", "cpu, cuda, cuda:1, replay:FILE; with --merge, the runs to join.")]
Folder = Annotated[str, opt("--output -o", "RUN", "Folder of the run; a rerun into it goes on where it ended.")]
Budget = Annotated[str, opt("--budget", "TIME", "Time to measure for: 2min, 90s, 1h.")]
Dtype = Annotated[str, opt("--dtype", "NAME", "Number format to measure; a run has one.")]
Hardware = Annotated[
    str, opt("--hardware", "NAME", "Profile with the datasheet; found by the device's name, or measured, if left out.")
]
Seed = Annotated[int, opt("--seed", "N", "Of the choice and the order of the shapes.")]
Merge = Annotated[
    bool, opt("--merge", None, "Join the records of runs on several machines of one kind into the file RUN.")
]
# fmt: on


def command(
    device: Devices,
    output: Folder,
    budget: Budget = "10min",
    dtype: Dtype = "bf16",
    hardware: Hardware = "",
    seed: Seed = 0,
    merge: Merge = False,
    json: options.Json = False,
) -> None:
    """Measure a device.

    Every record is on the disk before the next shape is timed, so that a killed run loses nothing and the same command
    goes on with it. A folder of another device, driver or number format is refused.
    """
    if merge:
        _merge(device, output, json)
        return
    if len(device) != 1:
        raise InputError(f"DEVICE: expected one, got {len(device)}; to join runs, add --merge")
    found = measure(device[0], output, seconds("--budget", budget), dtype, hardware=hardware, seed=seed)
    if render.Output(json).write([outcome_row(found)]):
        print(f"{Path(output) / 'records.jsonl'}: {describe(found.outcome)}")
    finish(found.outcome)


def measure(device: str, output: str, budget_s: float, dtype: str, host: bool = False, **settings: Any) -> Measured:
    """Open a device, measure it, or its host, into a folder with a progress bar, and close it whatever happens."""
    from calibration.devices import open_device
    from calibration.runners.runs import check_folder, measure_host, measure_into

    check_folder(output)
    settings |= {"budget_s": budget_s, "dtype": dtype, "say": render.note}
    opened = open_device(device)
    try:
        with render.progress("measuring") as report:
            return (measure_host if host else measure_into)(output, opened, progress=report, **settings)
    finally:
        opened.close()


def describe(outcome: Outcome) -> str:
    """What came of a run, on one line."""
    c = outcome.counts
    parts = [f"{c.timed + c.resumed} operators timed", f"{c.resumed} of them before" if c.resumed else ""]
    for name in ("noisy", "throttled", "skipped", "unsupported", "refused", "failed", "left"):
        if count := getattr(c, name):
            parts.append(f"{count} {name}")
    return f"{', '.join(filter(None, parts))} in {render.seconds(outcome.elapsed_s)}"


def outcome_row(found: Measured) -> dict[str, Any]:
    """The same as plain data."""
    outcome = found.outcome
    row = {"planned": len(found.plan.items), "elapsed_s": outcome.elapsed_s, "stopped": outcome.stopped}
    return {**row, **asdict(outcome.counts), "problems": list(outcome.problems)}


def finish(outcome: Outcome) -> None:
    """Notes on what went wrong; stops the program with its status where the run was cut short."""
    for line in outcome.problems[:10]:
        render.note(line)
    if len(outcome.problems) > 10:
        render.note(f"and {len(outcome.problems) - 10} more like these, in the records")
    if not outcome.complete:
        render.note(f"stopped: {outcome.stopped}; the same command goes on from here")
        raise typer.Exit(130 if outcome.stopped == "interrupted" else 1)


def _merge(runs: list[str], output: str, json: bool) -> None:
    from calibration.records.store import merge

    files = [Path(run) / "records.jsonl" if Path(run).is_dir() else Path(run) for run in runs]
    content = merge(files, output)
    row = {"file": output, "runs": len(files), "records": len(content.rows), "dropped": content.dropped}
    if render.Output(json).write([row]):
        print(f"{output}: {len(content.rows):,} records of {len(files)} runs on {content.header.device}")
        if content.dropped:
            render.note(f"{content.dropped} last lines were cut short and dropped")
