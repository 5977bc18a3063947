"""``prunesim calibrate``: measure a device, fit a profile, and judge it on shapes held out before, in one go."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from calibration.cli.fit import part_row, show_fit, show_update
from calibration.cli.measure import Budget, Dtype, Folder, Hardware, Seed, describe, finish, measure, outcome_row
from calibration.cli.rows import seconds
from simulator.cli import options, render
from simulator.cli.options import arg, opt
from simulator.engines import DEFAULT_ENGINE
from simulator.errors import InputError

if TYPE_CHECKING:
    from calibration.runners.runs import Calibrated

# fmt: off
DeviceName = Annotated[str, arg("DEVICE", "cpu, cuda, cuda:1 or replay:FILE; host for the host time alone.")]
Model = Annotated[str | None, opt("--for", "MODEL", "Measure this model's dense and pruned GEMMs first, exactly.")]
Family = Annotated[str, opt("--family", "LIST", "With --for: how the model is pruned.")]
Sparsity = Annotated[str, opt("--sparsity", "LIST", "With --for: fractions removed.")]
Quick = Annotated[
    bool, opt("--quick", None, "Move --hardware as a whole by a few measured rows instead of a fit.")
]
# fmt: on


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
    seed: Seed = 0,
    json: options.Json = False,
) -> None:
    """Calibrate a device in one go.

    Writes RUN/records.jsonl, RUN/profile.yaml and RUN/report.md with plots. The profile is for --hardware of every
    other command. A run that was stopped goes on with the same command. With DEVICE host only the time is measured, in
    seconds, that this machine's host takes to launch a kernel and an eager layer, on its first GPU or else its CPU, and
    --hardware is moved by it.
    """
    from calibration.runners.runs import fit_run
    from calibration.runners.targets import Asked, asked_workloads

    budget_s = seconds("--budget", budget)
    if device == "host":
        if model:
            raise InputError("--for: DEVICE host measures no operators of a model; name the device")
        _host(output, budget_s, dtype, hardware, seed, json)
        return
    asked: Asked = ()
    if model:
        asked = asked_workloads(
            model,
            phases=options.names("--phase", phase),
            batch=options.integers("--batch", batch),
            seq=options.integers("--seq", seq),
            dtype=dtype,
            families=options.names("--family", family),
            sparsities=options.fractions("--sparsity", sparsity),
            engine="" if device == "cpu" else DEFAULT_ENGINE,  # a CPU runs no engine that fuses projections
        )
    found = measure(device, output, budget_s, dtype, hardware=hardware, asked=asked, quick=quick, seed=seed)
    finish(found.outcome)
    with render.progress("fitting") as report:
        done = fit_run(output, anchor=quick, progress=report)
    if render.Output(json).write([_row(outcome_row(found), done)]):
        print(f"measured: {describe(found.outcome)}\n")
        _show(output, done)
    for line in done.fit.notes:
        render.note(line)


def _host(output: str, budget_s: float, dtype: str, hardware: str, seed: int, json: bool) -> None:
    import numpy as np

    from calibration.devices.protocol import LAYER_LAUNCHES
    from calibration.fit.predict import HostTime
    from calibration.runners.runs import DATASHEET, fit_run
    from simulator.hardware.library import load_hardware

    found = measure("host", output, budget_s, dtype, host=True, hardware=hardware, seed=seed)
    finish(found.outcome)
    done = fit_run(output, anchor=True)
    before, now = HostTime.of(load_hardware(Path(output) / DATASHEET)), HostTime.of(done.fit.profile)
    row = {"launch_s": now.launch_s, "half": math.expm1(now.half), "layer_s": now.layer_s, "launches": LAYER_LAUNCHES}
    row |= {"launch_before_s": before.launch_s, "half_before": math.expm1(before.half)}
    timed = found.records.select(found.records.timed)
    for name, kind in (("measured_layer_s", "layer_eager"), ("measured_bare_launch_s", "launch_eager")):
        row[name] = float(np.median(timed.seconds[timed.is_operator(kind)]))
    if render.Output(json).write([{"measured": outcome_row(found), **row, "notes": list(done.fit.notes)}]):
        said, was = (f"{render.seconds(h.launch_s)} a launch +-{100 * math.expm1(h.half):.0f} %" for h in (now, before))
        print(f"host: {said} (was {was}), {render.seconds(now.layer_s)} an eager layer of {LAYER_LAUNCHES} launches")
        layer, bare = (render.seconds(row[f"measured_{name}_s"]) for name in ("layer", "bare_launch"))
        print(f"measured: {layer} a layer, {bare} a launch without a layer round it")
        print(f"{Path(output) / 'profile.yaml'}: use it as --hardware")
    for line in done.fit.notes:
        render.note(line)


def _row(measured: dict[str, Any], done: Calibrated) -> dict[str, Any]:
    from calibration.fit.local_update import Updated, as_row
    from calibration.validation.scores import summary

    fit = done.fit
    return {
        "measured": measured,
        "fitted": [] if isinstance(fit, Updated) else [part_row(p) for p in fit.parts],
        "anchored": as_row(fit) if isinstance(fit, Updated) else None,
        "held_out": summary(done.held_out) if done.held_out else None,
        "exact": summary(done.exact) if done.exact else None,
    }


def _show(output: str, done: Calibrated) -> None:
    from calibration.cli.validate import show_report
    from calibration.fit.local_update import Updated

    if isinstance(done.fit, Updated):
        show_update(done.fit)
    else:
        show_fit(done.fit)
    print()
    if done.held_out is None:
        render.note("nothing was held out: the run was too short to judge the fit")
    else:
        show_report(done.held_out, "on shapes held out before the fit")
    if done.exact is not None:
        print()
        show_report(done.exact, "the model alone on the shapes measured exactly")
    folder = Path(output)
    print(f"\n{folder / 'profile.yaml'}: use it as --hardware" + (f"\n{folder / 'report.md'}" if done.held_out else ""))
