"""``prunesim validate``: a profile next to measurements, or predictions next to result files of
serving benchmarks."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from calibration.cli.fit import Map, conclude, load_rows
from simulator.cli import options, render
from simulator.cli.options import arg, option
from simulator.errors import InputError
from simulator.names import BENCHMARKS

if TYPE_CHECKING:
    from calibration.validation.runs import RunResult
    from calibration.validation.validate import Report


@dataclass(frozen=True)
class Given(options.Run):
    """Conditions that result files may lack: settings of a request, with their meaning here."""

    model: str | None = option(
        "MODEL", "With a FOLDER: model of files that do not name a known one."
    )
    hardware: str | None = option("NAME", "With a FOLDER: GPU. Default: that of the file.")
    engine: str | None = option("NAME", "With a FOLDER: engine. Default: that of the tool.")
    weight_dtype: str | None = option(
        "NAME", "With a FOLDER: format of weights. Default: that of the file."
    )
    kv_dtype: str | None = option(
        "NAME", "With a FOLDER: format of the K/V cache. Default: that of the file."
    )
    devices: str | None = options.setting_option(
        "devices", "N", "With a FOLDER: GPUs that share the model. Default: 1."
    )
    batch: str | None = option("N", "With a FOLDER: batch of files that do not state it.")
    seq: str | None = option("N", "With a FOLDER: prompt tokens of files that do not state them.")
    new_tokens: str | None = option(
        "N", "With a FOLDER: decode steps of files that do not state them; 0 is a prefill."
    )


@options.expanded("csv", "figure")
def command(
    profile: Annotated[
        str | None,
        arg(
            "PROFILE",
            f"Name, alias or YAML file of a profile; or a FOLDER with results of {BENCHMARKS}.",
        ),
    ] = None,
    tables: Annotated[
        list[str] | None, arg("TABLE...", "Tables, run folders, or names of shipped measurements.")
    ] = None,
    column_map: Map = None,
    dtype: str | None = option("NAME", "Number format to evaluate. Default: all."),
    markdown: str | None = option("FILE", "Write a report, with plots in the same folder."),
    given: Given = Given(),
    width: options.Width = None,
    font: options.Font = None,
    out: options.Output = options.OUTPUT,
) -> None:
    """Evaluate a profile on measurements.

    Begins with whether the profile holds: errors next to a datasheet roofline, and coverage of the
    intervals. The exit status is 1 if it holds for no operator. A table has the errors of times and
    of speedups, and those of two rooflines without a fit. With a folder of result files of serving
    benchmarks instead, predicts each result under its own conditions; the other options state
    conditions that the files lack.
    """
    from simulator.figures.style import PaperSize

    size = PaperSize.read(width, font)
    if (width, font) != (None, None) and not markdown:
        raise InputError("--width and --font: expected with --markdown FILE")
    if profile and Path(profile).is_dir():
        if tables or column_map or markdown:
            raise InputError(
                f"{profile}: is a folder of result files; expected no TABLE, --map or --markdown"
                " with it"
            )
        names = {"model": given.model, "hardware": given.hardware, "dtype": dtype}
        conditions = {name: text for name, text in names.items() if text}
        _runs(profile, conditions | options.single(given.asked().settings), out)
        return
    if given != Given():
        got = f"{profile}, which is not a folder" if profile else "none"
        raise InputError(
            "--model, --hardware and other conditions: expected a FOLDER of result files, got"
            f" {got}"
        )
    if not profile or not tables:
        example = "prunesim validate a100 a100_sxm/gemm/trtllm"
        raise InputError(
            f"expected a PROFILE and TABLES, such as: {example}; or a folder of result files"
        )
    from calibration.fit.base_profile import thread_notes
    from calibration.validation.validate import of_validation, summary, validate, write_markdown
    from simulator.files.write import check_target
    from simulator.hardware.library import load_hardware

    if markdown:
        check_target(markdown)
    hw = load_hardware(profile)
    rows, notes = load_rows(tables, hw, column_map=column_map)
    report = validate(hw, rows, dtype=dtype)
    if markdown:
        with size.applied():
            write_markdown(report, markdown)

    def show() -> tuple[str, ...]:
        excluded = show_report(report)
        if markdown:
            print(f"\n{markdown}")
        return excluded

    conclude(
        of_validation(report),
        [summary(report)],
        show,
        (*thread_notes(hw, report.device), *notes),
        out,
    )


def show_report(report: Report, title: str = "") -> tuple[str, ...]:
    """Print the accuracy of every part; return a note on the rows excluded for each reason."""
    from calibration.validation.validate import number, part_summary

    parts = [part_summary(part) for part in report.parts]
    scores = ("MAPE", "median", "p95", "bias")
    columns = render.columns(
        parts,
        (
            "<operator",
            lambda p: f"{p['operator']} {p['dtype']}{' *' if p['fitted_on_these_rows'] else ''}",
        ),
        ("rows", lambda p: f"{p['rows']:,}"),
        *(
            (f"{name}\n%", lambda p, name=name: number(p["errors"][name.lower()], 2))
            for name in scores
        ),
        ("speedup\nmedian %", lambda p: number(p["speedup"].get("median"), 2)),
        ("speedup\np95 %", lambda p: number(p["speedup"].get("p95"), 2)),
        ("coverage\n%", lambda p: number(p["coverage"][0]["coverage"], 2)),
        ("roofline\nMAPE %", lambda p: number(p["roofline"]["mape"], 2)),
        ("0.8 bw + 3 us\nMAPE %", lambda p: number(p["simple"]["mape"], 2)),
        ("<section", "status"),
    )
    about = title or f"on measurements of {report.device}, {report.software}"
    render.show(render.narrowed(columns, 6), f"{report.hardware} {about}")
    if any(p["fitted_on_these_rows"] for p in parts):
        print("* the profile was fitted on these rows; on shapes held out of the fit:")
        for name, values in report.accuracy.items():
            if any(name == part.name for part in report.parts):
                shown = [f"{score} {number(values.get(score.lower()), 2)}" for score in scores[:3]]
                print(f"  {name}: {', '.join(shown)} %")
    return tuple(f"{count} rows excluded: {reason}" for reason, count in report.skipped.items())


def _value(result: RunResult, value: float, *ends: float) -> str:
    if result.energy:
        return f"{value:.3g} J" + (f" ({ends[0]:.3g}-{ends[1]:.3g})" if ends else "")
    return render.seconds_between(value, *ends) if ends else render.seconds(value)


def _runs(folder: str, given: dict[str, Any], out: options.Output) -> None:
    from calibration.validation.runs import evaluate, of_runs

    results = evaluate(folder, given)
    skipped = [f"{r.source}: skipped: {r.reason}" for r in results if r.compared is None]
    if len(skipped) == len(results):
        raise InputError(f"{folder}: expected a result that can be predicted; {skipped[0]}")
    if out.write([r.as_row() for r in results]):
        render.conclude(*of_runs(results, folder))
        columns = render.columns(
            [(r, r.compared) for r in results if r.compared is not None],
            ("<file", lambda rc: rc[0].source),
            ("<model", lambda rc: rc[0].model),
            ("<GPU", lambda rc: rc[1].gpu),
            ("<engine", lambda rc: rc[1].engine),
            ("<request", lambda rc: rc[0].request),
            ("measured", lambda rc: _value(rc[0], rc[1].measured)),
            ("predicted", lambda rc: _value(rc[0], rc[1].predicted, rc[1].lower, rc[1].upper)),
            ("error", lambda rc: f"{100 * rc[1].error:+.1f} %"),
            ("inside", lambda rc: "yes" if rc[1].inside else "no"),
        )
        render.show(
            render.narrowed(columns, 6),
            "Measured and predicted times per pass (serve: per request or whole run), and energies"
            " per output token",
        )
    render.notes([*skipped, *(note for r in results for note in r.notes)], out.verbose)
