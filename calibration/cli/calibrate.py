"""``prunesim calibrate``: measure a device, fit a profile and validate it on held-out shapes; and
functions for all commands that measure."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from calibration.cli.fit import conclude, part_row, record_verdict, show_fitted
from simulator.arguments import SIZE, number
from simulator.cli import options, parsing, render
from simulator.cli.options import arg, opt, option
from simulator.errors import InputError, one_line
from simulator.request import DEFAULT_DTYPE, DEFAULT_ENGINE, Name

if TYPE_CHECKING:
    from calibration.measure.run import Outcome
    from calibration.runners.compare import ComparedCases
    from calibration.runners.engine import ComparedPass
    from calibration.runners.in_engine import EngineCheck
    from calibration.runners.runs import Calibrated, MeasuredRun, RunOptions, TargetModels

# environment variable with the number of restarts so far, its limit
RESTARTS, MOST_RESTARTS = "PRUNESIM_RESTARTS", 3
_SECONDS = {"s": 1.0, "sec": 1.0, "min": 60.0, "m": 60.0, "h": 3600.0}

Folder = Annotated[
    str, opt("--output -o", "RUN", "Folder of the run; a run in an existing folder resumes.")
]


@dataclass(frozen=True)
class Measuring:
    budget: str = option("TIME", "Time for the measurement: 2min, 90s, 1h.", "3min")
    hardware: str = option(
        "NAME", "Profile with the datasheet. Default: found by the device's name, or measured.", ""
    )
    threads: int | None = option(
        "N", "Threads of a CPU. Default: OMP_NUM_THREADS, else the CPUs of this process."
    )
    seed: int = option("N", "Seed of the choice and order of the shapes.", 0)

    def __post_init__(self) -> None:
        number("--seed", self.seed, SIZE)


@dataclass(frozen=True)
class EngineRun:
    engine: str = option(
        "NAME",
        "vllm, hf (Transformers) or none. Default: vLLM if installed, on a CPU Transformers.",
        "",
    )
    vllm_python: str = option(
        "PATH", "Python that has vLLM. Default: the one that runs this command.", ""
    )


@dataclass(frozen=True)
class Target:
    model: str | None = option(
        "MODEL", "Measure the dense and pruned GEMMs of this model exactly, first.", flags="--for"
    )
    family: str = option(
        "LIST", "With --for: pruning families.", "depth,width,width_cross,low_rank"
    )
    sparsity: str = option("LIST", "With --for: removed fractions.", "0.25,0.5")


@dataclass(frozen=True)
class _Stage:
    """The small models that run in an engine after the operators of a device."""

    engine: str  # "" or "none": no engine
    model: str
    python: str  # python that has vLLM

    @property
    def runs(self) -> bool:
        return self.engine not in ("", "none")


@dataclass(frozen=True)
class _Calibration:
    device: str
    output: str
    how: RunOptions
    threads: int | None


OPERATORS = 0.6  # share of the time for operators, if an engine runs
_ONE_PASS = {"phase": "prefill", "batch": 1, "seq": 1}  # all shapes (n, k) of a model

REQUESTS: options.Run = options.run_options(
    "phase", "batch", "seq", "dtype", phase="prefill,decode", batch=None, seq=None, dtype=None
)


def in_format(run: options.Run, device: str) -> options.Run:
    """Return the settings with a number format: bf16 by default, or on a device without bf16
    arithmetic, which is stated before anything is measured, fp32 (a CPU) or fp16 (a GPU)."""
    asked: str | None = run.text("dtype")
    slow, other = "", "fp32" if device == "cpu" else "fp16"
    if not find_spec("torch"):
        pass  # opening the device says so, after the options are checked
    elif device == "cpu" and asked in (None, DEFAULT_DTYPE):
        from calibration.devices.cpu import lacks_bf16

        if slow := lacks_bf16():
            slow += " has no bf16 instructions that torch uses"
    elif device.startswith("cuda") and asked in (None, DEFAULT_DTYPE):
        from calibration.devices import cuda

        if slow := cuda.lacks_bf16(device):
            slow += " has no bf16 arithmetic"
    emulated = device == "cpu" and asked is not None
    if slow:
        use = f"it is emulated slowly; use --dtype {other}" if emulated else f"{other} is used"
        render.status(f"{slow}; {use}")
    settings: Any = run  # a dataclass, see run_options
    dtype = other if slow and not emulated else asked or DEFAULT_DTYPE
    chosen: options.Run = replace(settings, dtype=dtype)
    return chosen


@options.expanded("csv", "figure")
def command(
    device: Annotated[
        str, arg("DEVICE", "cpu, cuda, cuda:1 or replay:planted; engine measures an engine.")
    ],
    output: Folder = "calibrated",
    measuring: Measuring = Measuring(),
    target: Target = Target(),
    runner: EngineRun = EngineRun(),
    run: options.Run = REQUESTS,
    measure_only: bool = option(
        None, "Write RUN/records.jsonl only: no fit, no validation.", False
    ),
    out: options.Output = options.OUTPUT,
) -> None:
    """Calibrate a device in one step.

    Begins with whether to use the profile: its errors on held-out shapes next to those of a
    datasheet roofline. Ends with whether to trust it, and which operators are borrowed. The exit
    status is 1 if its errors are larger than the roofline's, if there are too few held-out shapes,
    or if the machine was busy. Measures operators for 60 % of the time, then the host of the
    installed engine, and one dense and one pruned model in this engine (--engine none: operators
    for all of the time). The shipped fit of a known GPU supports the new fit. Writes
    RUN/records.jsonl, RUN/profile.yaml for --hardware of other commands, and RUN/report.md with
    plots. A profile exists from the beginning; run the command again to resume a stopped run. A
    folder of another device, driver, number format or number of threads is an error.

    DEVICE engine runs smaller dense copies of a model (--for) in an engine (--engine) on the device
    of RUN/profile.yaml or of --hardware, and adds the engine's host times and a factor per operator
    to RUN/profile.yaml, in --phase, --batch and --seq (default: a few short ones), within --budget.

    The default of --dtype is bf16, or fp32 on a CPU and fp16 on a GPU without bf16 arithmetic.
    """
    from calibration.runners.in_engine import check_engine_budget, default_model
    from calibration.runners.runs import RunOptions, measure_into, target_workloads

    run = in_format(run, "cpu" if device == "engine" and on_cpu(output, measuring) else device)
    how = RunOptions(
        seconds("--budget", measuring.budget), run.text("dtype"), measuring.hardware, measuring.seed
    )
    if device == "engine":
        if measure_only:
            raise InputError("--measure-only: cannot be used to calibrate an engine")
        _engine(output, how, target.model or "", runner, measuring.threads, run, out)
        return
    cpu = device == "cpu"
    stage = _stage_of(runner, device, target.model or default_model(cpu), measure_only)
    check_engine_budget(stage.engine, device, how.budget_s)
    # no engine fuses projections on a CPU
    settings = {**run.asked().settings, "engine": "" if cpu else DEFAULT_ENGINE}
    targets: TargetModels = ()
    if target.model:
        families, fractions = (
            parsing.names("--family", target.family),
            parsing.fractions("--sparsity", target.sparsity),
        )
        targets = target_workloads(target.model, families, fractions, settings)
    models = () if cpu else target_workloads(stage.model, (), (), settings | _ONE_PASS)
    measure = partial(
        measure_into,
        targets=targets,
        run_models=[dense for dense, *_ in models],
        draft=not measure_only,
    )
    operators = replace(how, budget_s=how.budget_s * (OPERATORS if stage.runs else 1.0))
    found = measured(device, output, measure, operators, measuring.threads)
    if measure_only:
        if out.write([outcome_row(found)]):
            print(f"{Path(output) / 'records.jsonl'}: {describe(found.outcome)}")
        finish(found.outcome, verbose=out.verbose)
        return
    calibration = _Calibration(device, output, how, measuring.threads)
    _conclude(stage, calibration, found, out)


def _stage_of(runner: EngineRun, device: str, model: str, operators_only: bool) -> _Stage:
    """Return the models that run after the operators: none on a replayed device."""
    from calibration.runners.engine import MEASURED
    from calibration.runners.in_engine import installed_engine

    engine = runner.engine
    if engine:
        Name((*MEASURED, "none")).check("--engine", engine)
    elif not operators_only and device.startswith(("cpu", "cuda")):
        engine = installed_engine(runner.vllm_python, device == "cpu")
    return _Stage(engine, model, runner.vllm_python)


def _engine(
    output: str,
    how: RunOptions,
    model: str,
    runner: EngineRun,
    threads: int | None,
    asked: options.Run,
    out: options.Output,
) -> None:
    from calibration.devices import open_device
    from calibration.runners import engine as measuring
    from calibration.runners.cases import ModelRun
    from calibration.runners.in_engine import default_model, installed_engine
    from calibration.runners.runs import PROFILE, check_folder
    from simulator.hardware.library import load_hardware
    from simulator.hardware.save import save_hardware
    from simulator.models.library import load_model
    from simulator.models.write import content_of

    file = check_folder(output) / PROFILE
    hw = load_hardware(how.hardware or file)
    cpu = hw.architecture == "cpu"
    engine = runner.engine or installed_engine(runner.vllm_python, cpu) or measuring.MEASURED[0]
    name = Name(measuring.MEASURED).check("--engine", engine)
    chosen = model or default_model(cpu)
    python = runner.vllm_python or sys.executable
    run = ModelRun(load_model(chosen), how.dtype, name, content_of(chosen), python, how.seed)
    with closing(open_device("cpu" if cpu else "cuda", threads=threads)) as opened:
        render.status(
            f"{opened.describe().device}; {how.dtype}; {name}; copies of {run.config.name}"
        )
        with render.progress("running") as report:
            batches, lengths = (
                parsing.integers(f"--{name}", text) if (text := asked.text(name)) else []
                for name in ("batch", "seq")
            )
            phases = parsing.names("--phase", asked.text("phase"))
            settings = measuring.settings_of(phases, batches, lengths)
            try:
                passes = measuring.observe(file.parent, opened, run, settings, how.budget_s, report)
            except KeyboardInterrupt as stop:
                render.notes((str(stop),) if str(stop) else ())
                raise typer.Exit(130) from None
    found = measuring.calibrated(passes, run, hw)
    judged = found.judged(str(file))
    if not judged.status:
        save_hardware(found.profile, file)
    left = 2 * len(settings) - len(passes)
    notes = (f"{left} passes left (budget); run the command again to resume",) if left else ()
    show = partial(_show_engine, found.compared)
    row = {"engine": name, **asdict(found.times), "passes": [asdict(one) for one in found.compared]}
    conclude(judged, [row], show, notes, out)


def on_cpu(output: str, measuring: Measuring) -> bool:
    """Return whether the profile of an engine's calibration is that of a CPU."""
    from calibration.runners.runs import PROFILE, check_folder
    from simulator.hardware.library import load_hardware

    file = check_folder(output) / PROFILE
    if not (measuring.hardware or file.is_file()):
        raise InputError(
            f"{file} does not exist; expected --hardware, or the folder of a calibration of this"
            " device"
        )
    return load_hardware(measuring.hardware or file).architecture == "cpu"


def _conclude(
    stage: _Stage, calibration: _Calibration, found: MeasuredRun, out: options.Output
) -> None:
    """Fit what was measured, run the engine, and print whether to trust the profile."""
    from calibration.runners.runs import PROFILE, fit_run
    from calibration.validation.validate import DO_NOT_USE, IDLE, LONGER, Judgement

    folder = Path(calibration.output)
    # a longer run would be as noisy
    noisy = found.outcome.counts.noisy > 0.5 * found.outcome.counts.timed
    remedy = IDLE if noisy else LONGER
    try:
        with render.progress("fitting") as report:
            done = fit_run(folder, progress=report)
    except InputError as error:  # too few or useless rows
        text = f"There is no fit to use in {folder}: {error}. {remedy[:1].upper()}{remedy[1:]}."
        judged = Judgement(DO_NOT_USE, (text,), (str(error),))
        if (folder / PROFILE).is_file():
            record_verdict(judged, folder / PROFILE)
        notes, status = ended(found.outcome)
        row = {"measured": outcome_row(found)}
        conclude(judged, [row], tuple, notes, out, found.outcome.problems, status)
        return
    _conclude_fit(stage, calibration, found, done, remedy, out)


def _conclude_fit(
    stage: _Stage,
    calibration: _Calibration,
    found: MeasuredRun,
    done: Calibrated,
    remedy: str,
    out: options.Output,
) -> None:
    from calibration.runners.in_engine import trust
    from calibration.runners.runs import PROFILE
    from calibration.validation.validate import of_calibration, summary

    folder = Path(calibration.output)
    notes, status = ended(found.outcome)
    judged = of_calibration(done.held_out, folder, done.disturbed, remedy)
    record_verdict(judged, folder / PROFILE)
    check = None
    if stage.runs and found.outcome.complete:
        check, more, status = _in_engine(stage, calibration, folder / PROFILE)
        notes += more
    last = trust(folder / PROFILE, judged, done.fit.parts, calibration.how.dtype, check)
    row = {
        "measured": outcome_row(found),
        "fitted": [part_row(p) for p in done.fit.parts],
        "held_out": summary(done.held_out) if done.held_out else None,
        "exact": summary(done.exact) if done.exact else None,
        "engine": asdict(check.found.times) if check and check.found else None,
        "compared": [asdict(r) for r in check.rows] if check else [],
        "trust": last,
    }

    def show() -> tuple[str, ...]:
        lines = _show(folder, done, describe(found.outcome))
        if check:
            if check.found:
                print()
                _show_engine(check.found.compared, f"copies of {check.model} in {check.title}")
            _show_compared(check)
        print()
        render.say(last)
        return lines

    conclude(judged, [row], show, (*notes, *done.fit.notes), out, found.outcome.problems, status)


def _in_engine(
    stage: _Stage, calibration: _Calibration, file: Path
) -> tuple[EngineCheck | None, tuple[str, ...], int]:
    """Return what the engine showed, notes, and the exit status of an interrupt."""
    from calibration.devices import open_device
    from calibration.runners.in_engine import check_engine, small_model
    from simulator.hardware.library import load_hardware

    how = calibration.how
    try:
        with (
            closing(open_device(calibration.device, threads=calibration.threads)) as opened,
            render.progress("running") as report,
        ):
            model = small_model(stage.model, stage.engine, how.dtype, opened)
            model = replace(model, python=stage.python or sys.executable, seed=how.seed)
            layers = len(model.config.layers)
            render.status(f"{stage.engine}: {layers} layers of {stage.model}, dense and pruned")
            left_s = (1.0 - OPERATORS) * how.budget_s
            check = check_engine(file, opened, model, load_hardware(file), left_s, report)
    except KeyboardInterrupt:
        return None, ("stopped: interrupted; run the command again to resume",), 130
    except Exception as error:  # an engine may raise any exception; the profile is written
        return None, (f"{stage.engine} was not run: {one_line(str(error), 300)}",), 0
    stopped = f"{stage.engine}: {check.stopped}; run the command again to resume"
    return check, (*((stopped,) if check.stopped else ()), *check.notes), 0


def _show_engine(compared: Sequence[ComparedPass], title: str = "") -> tuple[str, ...]:
    render.show(
        render.columns(
            compared,
            ("<phase", "phase"),
            ("batch\nx seq", lambda r: f"{r.batch} x {r.seq}"),
            ("layers", "layers"),
            ("measured", "seconds", render.seconds),
            ("interval\n+-%", lambda r: f"{100 * r.half:.1f}"),
            ("before", "before_s", render.seconds),
            ("after", "after_s", render.seconds),
            ("error\n%", lambda r: f"{100 * (r.after_s / r.seconds - 1):+.1f}"),
            ("left out\nerror %", lambda r: f"{100 * (r.held_out_s / r.seconds - 1):+.1f}"),
        ),
        title,
    )
    return ()


def _show_compared(check: EngineCheck) -> None:
    if not check.rows:
        return
    print()
    render.show(
        render.columns(
            check.rows,
            ("<pruning", "pruning"),
            ("<phase", "phase"),
            ("dense", "dense_s", render.seconds),
            ("predicted", "predicted_dense_s", render.seconds),
            ("measured\nspeedup", "measured", render.ratio),
            ("\npredicted", "predicted", render.ratio),
            (
                "interval",
                lambda r: f"{render.ratio(r.predicted_lower)}-{render.ratio(r.predicted_upper)}",
            ),
            ("error\n%", lambda r: f"{100 * r.error:+.1f}"),
        ),
        f"{check.model} in {check.title}, dense and pruned",
    )


def _show(folder: Path, done: Calibrated, measured: str) -> tuple[str, ...]:
    from calibration.cli.validate import show_report

    print(f"measured: {measured}\n")
    lines = show_fitted(done.fit)
    about = {
        "on held-out shapes": done.held_out,
        "cost model alone, on the shapes measured exactly": done.exact,
    }
    for title, report in about.items():
        if report is not None:
            print()
            lines += show_report(report, title)
    if done.held_out:
        print(f"\n{folder / 'report.md'}")
    return lines


def measured(
    device: str,
    output: str,
    measure: Callable[..., MeasuredRun],
    how: RunOptions,
    threads: int | None = None,
) -> MeasuredRun:
    from calibration.devices import open_device
    from calibration.runners.runs import check_folder

    check_folder(output)
    with (
        closing(open_device(device, threads=threads)) as opened,
        render.progress("measuring") as report,
    ):
        found = measure(output, opened, how, progress=report, note=render.status)
    restart_if_needed(found.outcome, render.status)
    return found


def describe(outcome: Outcome) -> str:
    c = outcome.counts
    parts = [
        f"{c.timed + c.resumed} operators timed",
        f"{c.resumed} of them earlier" if c.resumed else "",
    ]
    for name in ("noisy", "throttled", "skipped", "unsupported", "refused", "failed", "left"):
        if count := getattr(c, name):
            parts.append(f"{count} {name}")
    return f"{', '.join(filter(None, parts))} in {render.seconds(outcome.elapsed_s)}"


def outcome_row(found: MeasuredRun) -> dict[str, Any]:
    outcome = found.outcome
    row = {
        "planned": len(found.plan.items) - found.plan.spare,
        "elapsed_s": outcome.elapsed_s,
        "stopped": outcome.stopped,
    }
    return {**row, **asdict(outcome.counts), "problems": list(outcome.problems)}


def ended(outcome: Outcome) -> tuple[tuple[str, ...], int]:
    """Return why a run stopped early, if it did, and its exit status."""
    if outcome.complete:
        return (), 0
    why = f"stopped: {outcome.stopped}; run the command again to resume"
    return (why,), 130 if outcome.stopped == "interrupted" else 1


def finish(outcome: Outcome, notes: Sequence[str] = (), verbose: bool = False) -> None:
    """Print why a run stopped early, ``notes``, and the problems of the run; exit with its status
    if it stopped."""
    stopped, status = ended(outcome)
    render.notes((*stopped, *notes, *outcome.problems), verbose)
    if status:
        raise typer.Exit(status)


def restart_if_needed(outcome: Outcome | ComparedCases, note: Callable[[str], None]) -> None:
    """Restart this program, which resumes from its records, if a run needs a new process: a failed
    capture of a CUDA graph spoils its process, and so do most errors of CUDA. Another program, such
    as a notebook, is not restarted."""
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
    """Return the seconds of a time such as "2min", "90s" or "0.5h"; a number without unit is in
    seconds."""
    match = re.fullmatch(r"\s*([0-9]*\.?[0-9]+)\s*([a-z]*)\s*", text.lower())
    value = float(match[1]) * _SECONDS.get(match[2] or "s", 0.0) if match else 0.0
    if value <= 0.0:
        raise InputError(
            f"{option}: expected a time above zero such as 2min, 90s or 1h, got {text!r}"
        )
    return value
