"""``prunesim calibrate``: measure a device, fit a profile and validate it on held-out shapes, in one step."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from calibration.cli.fit import part_row, show_fit, show_update
from calibration.cli.measure import (
    Budget,
    Dtype,
    Folder,
    Hardware,
    Seed,
    Threads,
    describe,
    finish,
    measured,
    outcome_row,
    seconds,
)
from simulator.cli import options, parsing, render
from simulator.cli.options import arg, opt
from simulator.engines import DEFAULT_ENGINE
from simulator.errors import InputError

if TYPE_CHECKING:
    from calibration.runners.runs import Calibrated, MeasuredRun

DeviceName = Annotated[str, arg("DEVICE", "cpu, cuda, cuda:1 or replay:FILE; host measures only the host time.")]
Model = Annotated[str | None, opt("--for", "MODEL", "Measure the dense and pruned GEMMs of this model exactly, first.")]
Family = Annotated[str, opt("--family", "LIST", "With --for: pruning families.")]
Sparsity = Annotated[str, opt("--sparsity", "LIST", "With --for: removed fractions.")]
MeasureOnly = Annotated[bool, opt("--measure-only", None, "Write RUN/records.jsonl only: no fit, no validation.")]
Quick = Annotated[bool, opt("--quick", None, "Re-anchor --hardware with a few measured rows instead of a fit.")]


def command(
    device: DeviceName,
    output: Folder,
    budget: Budget = "10min",
    dtype: Dtype = "bf16",
    model: Model = None,
    phase: options.Phase = "prefill,decode",
    batch: options.Batch = "1",
    seq: options.Seq = "2048",
    family: Family = "depth,width,width_cross,low_rank",
    sparsity: Sparsity = "0.25,0.5",
    hardware: Hardware = "",
    quick: Quick = False,
    measure_only: MeasureOnly = False,
    threads: Threads = None,
    seed: Seed = 0,
    json: options.Json = False,
    verbose: options.Verbose = False,
) -> None:
    """Calibrate a device in one step.

    Begins with whether to use the profile: its errors on held-out shapes next to those of a datasheet roofline. The
    exit status is 1 if not: larger errors than the roofline's, too few held-out shapes, or a busy machine.
    Writes RUN/records.jsonl, RUN/profile.yaml and RUN/report.md with plots. Use the profile as --hardware of other
    commands. Every record is on the disk before the next measurement: run the command again to resume a stopped run. A
    folder of another device, driver, number format or number of threads is an error. DEVICE host takes a few seconds;
    it measures only the host's launch time per kernel and per eager layer, on the first GPU or else the CPU, and
    updates --hardware.
    """
    from calibration.evidence.verdict import of_calibration
    from calibration.fit.local_update import Updated
    from calibration.runners.runs import TargetModels, fit_run, measure_into, target_workloads

    budget_s = seconds("--budget", budget)
    if measure_only and (quick or device == "host"):
        raise InputError("--measure-only: expected no --quick and no DEVICE host with it")
    if device == "host":
        if model:
            raise InputError("--for: DEVICE host does not measure operators of a model; use another device")
        if threads is not None:
            raise InputError("--threads: DEVICE host is measured with one thread; use another device")
        _host(output, budget_s, dtype, hardware, seed, json, verbose)
        return
    targets: TargetModels = ()
    if model:
        targets = target_workloads(
            model,
            phases=parsing.names("--phase", phase),
            batch=parsing.integers("--batch", batch),
            seq=parsing.integers("--seq", seq),
            dtype=dtype,
            families=parsing.names("--family", family),
            sparsities=parsing.fractions("--sparsity", sparsity),
            engine="" if device == "cpu" else DEFAULT_ENGINE,  # no engine fuses projections on a CPU
        )

    how: dict[str, Any] = {"budget_s": budget_s, "dtype": dtype, "hardware": hardware, "seed": seed}
    found = measured(device, output, measure_into, threads, **how, targets=targets, quick=quick)
    if measure_only and render.Output(json).write([outcome_row(found)]):
        print(f"{Path(output) / 'records.jsonl'}: {describe(found.outcome)}")
    if measure_only or not found.outcome.complete:
        finish(found.outcome, verbose=verbose)
    if measure_only:
        return
    try:
        with render.progress("fitting") as report:
            done = fit_run(output, anchor=quick, progress=report)
    except InputError as error:  # too few or useless rows: the run is there, a profile is not
        _nothing_fitted(output, found, error, json, verbose)
    update = done.fit if isinstance(done.fit, Updated) else None
    judged = of_calibration(done.held_out, update, output, done.fit.profile.name, done.disturbed)
    lines: tuple[str, ...] = done.fit.notes
    if render.Output(json).write([judged.as_row() | _row(outcome_row(found), done)]):
        render.conclude(*judged.sentences)
        lines += _show(output, done, describe(found.outcome))
    finish(found.outcome, lines, verbose)
    if judged.status:
        raise typer.Exit(judged.status)


def _nothing_fitted(output: str, found: MeasuredRun, error: InputError, json: bool, verbose: bool) -> NoReturn:
    from calibration.evidence.verdict import DO_NOT_USE, Judgement

    text = f"There is no profile to use in {output}: {error}. Run the command again with a larger --budget."
    judged = Judgement(DO_NOT_USE, (text,), (str(error),))
    if render.Output(json).write([judged.as_row() | {"measured": outcome_row(found)}]):
        render.conclude(*judged.sentences)
    finish(found.outcome, verbose=verbose)
    raise typer.Exit(judged.status)


def _host(output: str, budget_s: float, dtype: str, hardware: str, seed: int, json: bool, verbose: bool) -> None:
    import numpy as np

    from calibration.devices.protocol import LAYER_LAUNCHES
    from calibration.evidence.verdict import USE, Judgement, with_disturbed
    from calibration.fit.predict import LaunchTime
    from calibration.runners.runs import DATASHEET, fit_run, measure_host
    from simulator.hardware.library import load_hardware

    how: dict[str, Any] = {"budget_s": budget_s, "dtype": dtype, "hardware": hardware, "seed": seed}
    found = measured("host", output, measure_host, **how)
    if not found.outcome.complete:
        finish(found.outcome, verbose=verbose)
    done = fit_run(output, anchor=True)
    before, now = LaunchTime.of(load_hardware(Path(output) / DATASHEET)), LaunchTime.of(done.fit.profile)
    timed = found.records.select(found.records.timed)
    layer_s = float(np.median(timed.seconds[timed.is_operator("layer_eager")]))
    bare_launch_s = float(np.median(timed.seconds[timed.is_operator("launch_eager")]))
    new, old = (
        render.seconds_between(host.launch_s, host.launch_s * math.exp(-host.half), host.launch_s * math.exp(host.half))
        for host in (now, before)
    )
    layer = f"{render.seconds(now.layer_s)} per eager layer of {LAYER_LAUNCHES} launches"
    profile = Path(output) / "profile.yaml"
    use = f"Use {profile} as --hardware: this host takes {new} per launch (before: {old}), {layer}."
    judged = with_disturbed(Judgement(USE, (use,)), profile, done.disturbed)
    row = judged.as_row() | {
        "measured": outcome_row(found),
        "launch_s": now.launch_s,
        "half": math.expm1(now.half),
        "layer_s": now.layer_s,
        "launches": LAYER_LAUNCHES,
        "launch_before_s": before.launch_s,
        "half_before": math.expm1(before.half),
        "measured_layer_s": layer_s,
        "measured_bare_launch_s": bare_launch_s,
        "notes": list(done.fit.notes),
    }
    if render.Output(json).write([row]):
        render.conclude(*judged.sentences)
        bare = render.seconds(bare_launch_s)
        print(f"measured: {render.seconds(layer_s)} per layer, {bare} per launch outside a layer")
    finish(found.outcome, done.fit.notes, verbose)
    if judged.status:
        raise typer.Exit(judged.status)


def _row(outcome: dict[str, Any], done: Calibrated) -> dict[str, Any]:
    from calibration.evidence.validate import summary
    from calibration.fit.local_update import Updated, as_row

    fit = done.fit
    return {
        "measured": outcome,
        "fitted": [] if isinstance(fit, Updated) else [part_row(p) for p in fit.parts],
        "anchored": as_row(fit) if isinstance(fit, Updated) else None,
        "held_out": summary(done.held_out) if done.held_out else None,
        "exact": summary(done.exact) if done.exact else None,
    }


def _show(output: str, done: Calibrated, measured: str) -> tuple[str, ...]:
    """Print the fit and the reports; return notes."""
    from calibration.cli.fit import fixed_notes
    from calibration.cli.validate import show_report, skipped_notes
    from calibration.fit.local_update import Updated

    print(f"measured: {measured}\n")
    if isinstance(done.fit, Updated):
        show_update(done.fit)
    else:
        show_fit(done.fit)
    lines = () if isinstance(done.fit, Updated) else fixed_notes(done.fit)
    about = {"on held-out shapes": done.held_out, "cost model alone, on the shapes measured exactly": done.exact}
    for title, report in about.items():
        if report is not None:
            print()
            show_report(report, title)
            lines += skipped_notes(report)
    if done.held_out:
        print(f"\n{Path(output) / 'report.md'}")
    return lines
