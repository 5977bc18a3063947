"""``prunesim calibrate``: measure a device, fit a profile and validate it on held-out shapes; and functions for all
commands that measure."""

from __future__ import annotations

import math
import os
import re
import sys
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from calibration.cli.fit import conclude, part_row, show_fitted
from simulator.cli import options, parsing, render
from simulator.cli.options import arg, opt
from simulator.errors import InputError
from simulator.request import DEFAULT_ENGINE

if TYPE_CHECKING:
    from calibration.measure.run import Outcome
    from calibration.runners.compare import ComparedCases
    from calibration.runners.runs import Calibrated, MeasuredRun, RunOptions

RESTARTS, MOST_RESTARTS = "PRUNESIM_RESTARTS", 3  # environment variable with the number of restarts so far, its limit
_SECONDS = {"s": 1.0, "sec": 1.0, "min": 60.0, "m": 60.0, "h": 3600.0}

# fmt: off
Folder = Annotated[str, opt("--output -o", "RUN", "Folder of the run; a run in an existing folder resumes.")]


@dataclass(frozen=True)
class Measuring:
    budget: Annotated[str, opt("--budget", "TIME", "Time for the measurement: 2min, 90s, 1h.")] = "10min"
    hardware: Annotated[str, opt(
        "--hardware", "NAME", "Profile with the datasheet. Default: found by the device's name, or measured.")] = ""
    threads: Annotated[int | None, opt(
        "--threads", "N", "Threads of a CPU. Default: OMP_NUM_THREADS, else the CPUs of this process.")] = None
    seed: Annotated[int, opt("--seed", "N", "Seed of the choice and order of the shapes.")] = 0


@dataclass(frozen=True)
class Target:
    model: Annotated[str | None, opt(
        "--for", "MODEL", "Measure the dense and pruned GEMMs of this model exactly, first.")] = None
    family: Annotated[str, opt(
        "--family", "LIST", "With --for: pruning families.")] = "depth,width,width_cross,low_rank"
    sparsity: Annotated[str, opt("--sparsity", "LIST", "With --for: removed fractions.")] = "0.25,0.5"


REQUESTS: options.Run = options.run_options("phase", "batch", "seq", "dtype", phase="prefill,decode")


@options.expanded("csv", "figure")
def command(
    device: Annotated[str, arg("DEVICE", "cpu, cuda, cuda:1 or replay:planted; host measures only the host time.")],
    output: Folder,
    measuring: Measuring = Measuring(),
    target: Target = Target(),
    run: options.Run = REQUESTS,
    quick: Annotated[bool, opt(
        "--quick", None, "Re-anchor --hardware with a few measured rows instead of a fit.")] = False,
    measure_only: Annotated[bool, opt(
        "--measure-only", None, "Write RUN/records.jsonl only: no fit, no validation.")] = False,
    out: options.Output = options.OUTPUT,
) -> None:
    # fmt: on
    """Calibrate a device in one step.

    Begins with whether to use the profile: its errors on held-out shapes next to those of a datasheet roofline. The
    exit status is 1 if its errors are larger, if there are too few held-out shapes, or if the machine was busy. Writes
    RUN/records.jsonl, RUN/profile.yaml for --hardware of other commands, and RUN/report.md with plots. Run the command
    again to resume a stopped run; a folder of another device, driver, number format or number of threads is an error.
    DEVICE host measures only the launch time per kernel and per eager layer, in seconds, and updates --hardware.
    """
    from calibration.evidence.validate import DO_NOT_USE, Judgement, of_calibration, summary
    from calibration.fit.local_update import Updated, as_row
    from calibration.runners.runs import RunOptions, TargetModels, fit_run, measure_into, target_workloads

    how = RunOptions(
        seconds("--budget", measuring.budget), run.text("dtype"), measuring.hardware, measuring.seed
    )
    if measure_only and (quick or device == "host"):
        raise InputError("--measure-only: expected no --quick and no DEVICE host with it")
    if device == "host":
        if target.model:
            raise InputError("--for: DEVICE host does not measure operators of a model; use another device")
        if measuring.threads is not None:
            raise InputError("--threads: DEVICE host is measured with one thread; use another device")
        _host(output, how, out)
        return
    targets: TargetModels = ()
    if target.model:
        families, fractions = parsing.names("--family", target.family), parsing.fractions("--sparsity", target.sparsity)
        engine = "" if device == "cpu" else DEFAULT_ENGINE  # no engine fuses projections on a CPU
        targets = target_workloads(target.model, families, fractions, {**run.asked().settings, "engine": engine})
    found = measured(device, output, partial(measure_into, targets=targets, quick=quick), how, measuring.threads)
    if measure_only and render.Output(out.json).write([outcome_row(found)]):
        print(f"{Path(output) / 'records.jsonl'}: {describe(found.outcome)}")
    if measure_only or not found.outcome.complete:
        finish(found.outcome, verbose=out.verbose)
    if measure_only:
        return
    try:
        with render.progress("fitting") as report:
            done = fit_run(output, anchor=quick, progress=report)
    except InputError as error:  # too few or useless rows
        text = f"There is no profile to use in {output}: {error}. Run the command again with a larger --budget."
        judged = Judgement(DO_NOT_USE, (text,), (str(error),))
        conclude(judged, [{"measured": outcome_row(found)}], tuple, (), out, found.outcome.problems)
        return
    update = done.fit if isinstance(done.fit, Updated) else None
    judged = of_calibration(done.held_out, update, output, done.fit.profile.name, done.disturbed)
    row = {
        "measured": outcome_row(found),
        "fitted": [] if isinstance(done.fit, Updated) else [part_row(p) for p in done.fit.parts],
        "anchored": as_row(update) if update else None,
        "held_out": summary(done.held_out) if done.held_out else None,
        "exact": summary(done.exact) if done.exact else None,
    }
    show = partial(_show, output, done, describe(found.outcome))
    conclude(judged, [row], show, done.fit.notes, out, found.outcome.problems)


def _host(output: str, how: RunOptions, out: options.Output) -> None:
    import numpy as np

    from calibration.devices.protocol import LAYER_LAUNCHES
    from calibration.evidence.validate import USE, Judgement, with_disturbed
    from calibration.fit.predict import LaunchTime
    from calibration.runners.runs import DATASHEET, fit_run, measure_host
    from simulator.hardware.library import load_hardware

    found = measured("host", output, measure_host, how)
    if not found.outcome.complete:
        finish(found.outcome, verbose=out.verbose)
    done = fit_run(output, anchor=True)
    before, now = LaunchTime.of(load_hardware(Path(output) / DATASHEET)), LaunchTime.of(done.fit.profile)
    timed = found.records.select(found.records.timed)
    kinds = ("layer_eager", "launch_eager")
    layer_s, bare_s = (float(np.median(timed.seconds[timed.is_operator(kind)])) for kind in kinds)
    ends = ([t.launch_s * math.exp(end * t.half) for end in (0, -1, 1)] for t in (now, before))
    new, old = (render.seconds_between(*times) for times in ends)
    layer = f"{render.seconds(now.layer_s)} per eager layer of {LAYER_LAUNCHES} launches"
    profile = Path(output) / "profile.yaml"
    use = f"Use {profile} as --hardware: this host takes {new} per launch (before: {old}), {layer}."
    judged = with_disturbed(Judgement(USE, (use,)), profile, done.disturbed)
    row = {
        "measured": outcome_row(found),
        "launch_s": now.launch_s,
        "half": math.expm1(now.half),
        "layer_s": now.layer_s,
        "launches": LAYER_LAUNCHES,
        "launch_before_s": before.launch_s,
        "half_before": math.expm1(before.half),
        "measured_layer_s": layer_s,
        "measured_bare_launch_s": bare_s,
        "notes": list(done.fit.notes),
    }

    def show() -> tuple[str, ...]:
        print(f"measured: {render.seconds(layer_s)} per layer, {render.seconds(bare_s)} per launch outside a layer")
        return ()

    conclude(judged, [row], show, done.fit.notes, out, found.outcome.problems)


def _show(output: str, done: Calibrated, measured: str) -> tuple[str, ...]:
    from calibration.cli.validate import show_report

    print(f"measured: {measured}\n")
    lines = show_fitted(done.fit)
    about = {"on held-out shapes": done.held_out, "cost model alone, on the shapes measured exactly": done.exact}
    for title, report in about.items():
        if report is not None:
            print()
            lines += show_report(report, title)
    if done.held_out:
        print(f"\n{Path(output) / 'report.md'}")
    return lines


def measured(
    device: str, output: str, measure: Callable[..., MeasuredRun], how: RunOptions, threads: int | None = None
) -> MeasuredRun:
    from calibration.devices import open_device
    from calibration.runners.runs import check_folder

    check_folder(output)
    with closing(open_device(device, threads=threads)) as opened, render.progress("measuring") as report:
        found = measure(output, opened, how, progress=report, note=render.status)
    restart_if_needed(found.outcome, render.status)
    return found


def describe(outcome: Outcome) -> str:
    c = outcome.counts
    parts = [f"{c.timed + c.resumed} operators timed", f"{c.resumed} of them earlier" if c.resumed else ""]
    for name in ("noisy", "throttled", "skipped", "unsupported", "refused", "failed", "left"):
        if count := getattr(c, name):
            parts.append(f"{count} {name}")
    return f"{', '.join(filter(None, parts))} in {render.seconds(outcome.elapsed_s)}"


def outcome_row(found: MeasuredRun) -> dict[str, Any]:
    outcome = found.outcome
    row = {"planned": len(found.plan.items), "elapsed_s": outcome.elapsed_s, "stopped": outcome.stopped}
    return {**row, **asdict(outcome.counts), "problems": list(outcome.problems)}


def finish(outcome: Outcome, notes: Sequence[str] = (), verbose: bool = False) -> None:
    """Print why a run stopped early, ``notes``, and the problems of the run; exit with its status if it stopped."""
    stopped = () if outcome.complete else (f"stopped: {outcome.stopped}; run the command again to resume",)
    render.notes((*stopped, *notes, *outcome.problems), verbose)
    if stopped:
        raise typer.Exit(130 if outcome.stopped == "interrupted" else 1)


def restart_if_needed(outcome: Outcome | ComparedCases, note: Callable[[str], None]) -> None:
    """Restart this program, which resumes from its records, if a run needs a new process: a failed capture of a CUDA
    graph spoils its process. Another program, such as a notebook, is not restarted."""
    script, done = Path(sys.argv[0]), os.environ.get(RESTARTS, "0")
    ours = script.stem == "prunesim" or script.parts[-3:] == ("simulator", "cli", "__main__.py")
    count = int(done) if done.isdecimal() else MOST_RESTARTS
    if not outcome.needs_new_process or count >= MOST_RESTARTS or not ours:
        return
    note(f"{outcome.stopped}; resuming in a new process")
    sys.stdout.flush()
    sys.stderr.flush()
    os.environ[RESTARTS] = str(count + 1)
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def seconds(option: str, text: str) -> float:
    """Return the seconds of a time such as "2min", "90s" or "0.5h"; a number without unit is in seconds."""
    match = re.fullmatch(r"\s*([0-9]*\.?[0-9]+)\s*([a-z]*)\s*", text.lower())
    value = float(match[1]) * _SECONDS.get(match[2] or "s", 0.0) if match else 0.0
    if value <= 0.0:
        raise InputError(f"{option}: expected a time above zero such as 2min, 90s or 1h, got {text!r}")
    return value
