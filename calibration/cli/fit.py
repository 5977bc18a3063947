"""``prunesim fit``: fit a calibrated profile to records and a datasheet."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Any

from calibration.cli.rows import RecordsArgument, load_rows
from simulator.cli import options, render
from simulator.cli.options import opt
from simulator.errors import InputError

if TYPE_CHECKING:
    from calibration.fit.local_update import Updated
    from calibration.fit.profile import ProfileFit
    from calibration.fit.solver import FittedPart

Output = Annotated[str, opt("--output -o", "PROFILE.yaml", "Profile to write; its arrays go to an .npz next to it.")]
Base = Annotated[str, opt("--hardware", "NAME", "Profile with the device's datasheet.")]
DtypeOnly = Annotated[str | None, opt("--dtype", "NAME", "Number format to fit. Default: all.")]
Prior = Annotated[
    str | None, opt("--prior", "NAME", "Calibrated profile of a related GPU or other stack, used as prior.")
]
Anchor = Annotated[bool, opt("--anchor", None, "Re-anchor --hardware with 20 to 400 rows measured on this machine.")]


def command(
    records: RecordsArgument,
    output: Output,
    hardware: Base,
    dtype: DtypeOnly = None,
    prior: Prior = None,
    anchor: Anchor = False,
    json: options.Json = False,
) -> None:
    """Calibrate a profile on records.

    Fits each operator and number format separately; sections without records keep the values of --hardware. Held-out
    rows are not used. Prints the fitted sections and their errors on shapes that the fit did not use. With --anchor
    nothing is fitted: the rows, of any operators, shift all predictions and narrow their intervals. The command then
    prints how this machine differs.
    """
    from calibration.fit.profile import fit_profile
    from simulator.files.write import check_target
    from simulator.hardware.library import load_hardware
    from simulator.hardware.save import save_hardware

    if not output.endswith((".yaml", ".yml")):
        raise InputError(f"{output}: expected a file name that ends in .yaml")
    check_target(output)
    if anchor and prior:
        raise InputError(
            "--anchor and --prior: expected one of them, got both; --hardware names the profile to re-anchor"
        )
    base = load_hardware(hardware)
    rows, notes = load_rows(records, base, screened=not anchor)
    if anchor:
        from calibration.fit.local_update import as_row, update_profile

        done = update_profile(base, rows, dtype=dtype)
        save_hardware(done.profile, output)
        if render.Output(json).write([as_row(done)]):
            show_anchor(done)
            print(f"\n{output}: {done.profile.title} on this machine and software")
        for line in (*notes, *done.notes):
            render.note(line)
        return
    sibling = load_hardware(prior) if prior else None
    with render.progress("fitting") as report:
        fit = fit_profile(base, rows, dtype=dtype, prior=sibling, progress=report)
    save_hardware(fit.profile, output)
    if render.Output(json).write([part_row(part) for part in fit.parts]):
        show_fit(fit)
        print(f"\n{output}: {len(fit.parts)} sections of {fit.profile.name}")
    for line in (*notes, *fit.notes):
        render.note(line)


def part_row(part: FittedPart) -> dict[str, Any]:
    """Return a fitted section as plain data."""
    s = part.section
    constants = {
        name: {"value": c.value, "std_error": c.std_error, "status": c.status} for name, c in s.constants.items()
    }
    return {
        "operator": part.operator,
        "dtype": part.dtype,
        "rows": part.rows,
        "status": s.status,
        "constants": constants,
        "fixed": dict(part.fixed),
        "accuracy": {name: float(value) for name, value in s.accuracy.items()},
        "correlations": {f"{a} {b}": value for (a, b), value in part.correlations.items()},
    }


def show_fit(fit: ProfileFit) -> None:
    """Print the sections and their constants that could not be fitted."""

    def accuracy(name: str) -> Callable[[FittedPart], str]:
        return lambda p: f"{100 * p.section.accuracy[name]:.2f} %" if name in p.section.accuracy else "-"

    columns = render.columns(
        fit.parts,
        ("<fitted part", lambda p: p.operator),
        ("<format", lambda p: p.dtype),
        ("rows", lambda p: f"{p.rows:,}"),
        ("unseen MAPE", accuracy("mape")),
        ("median", accuracy("median")),
        ("p95", accuracy("p95")),
    )
    render.show(columns, fit.profile.title)
    for p in fit.parts:
        fixed = [f"{name} ({why})" for name, why in p.fixed.items() if why != "structure"]
        if fixed:
            render.note(f"{p.operator} {p.dtype}: fixed, not fitted: {', '.join(fixed)}")


def show_anchor(done: Updated) -> None:
    """Print how this machine differs, and the errors of the rows."""

    def percent(value: float, sign: str = "") -> str:
        return f"{100 * value:{sign}.1f} %"

    effects = render.columns(
        done.effects,
        ("<times", lambda e: e.name),
        ("before", lambda e: f"+-{percent(e.prior_sd)}"),
        ("after", lambda e: f"{percent(e.mean, '+')} +-{percent(e.sd)}"),
        ("<meaning", lambda e: e.meaning),
    )
    render.show(effects, f"Effects of this machine and its software from {done.rows} rows, +- one standard deviation")
    print()
    fits = render.columns(
        done.fits,
        ("<operator", lambda f: f.name),
        ("rows", lambda f: f"{f.rows:,}"),
        ("error\nbefore", lambda f: percent(f.error_before)),
        ("\nafter", lambda f: percent(f.error_after)),
        ("90 % interval\nbefore", lambda f: f"+-{percent(f.half_before)}"),
        ("\nafter", lambda f: f"+-{percent(f.half_after)}"),
        ("coverage\nbefore", lambda f: percent(f.inside_before)),
        ("\nafter", lambda f: percent(f.inside_after)),
        ("\nz", lambda f: f"{f.z:.2f}"),
    )
    render.show(fits, "Mean error of the rows: before, and after re-anchoring with the other rows")
