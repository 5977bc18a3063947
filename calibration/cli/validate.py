"""``prunesim validate``: compare a profile with records, or run the accuracy protocol on the shipped measurements."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from calibration.cli.rows import load_rows
from simulator.cli import options, render
from simulator.cli.options import arg, opt
from simulator.errors import InputError

if TYPE_CHECKING:
    from calibration.validation.validate import Report

Profile = Annotated[str | None, arg("PROFILE", "Name, alias or YAML file of the profile to validate.")]
MaybeRecords = Annotated[list[str] | None, arg("RECORDS...", "Files, run folders or names of shipped measurements.")]
DtypeOnly = Annotated[str | None, opt("--dtype", "NAME", "Number format to validate. Default: all.")]
Markdown = Annotated[str | None, opt("--markdown", "FILE", "Write a report, with its plots next to it.")]
Html = Annotated[str | None, opt("--html", "FILE", "Write a report with its plots in one file.")]
Protocol = Annotated[
    bool, opt("--protocol", None, "Fit and validate on splits of the shipped measurements, next to baselines.")
]
Wheel = Annotated[str | None, opt("--wheel", "FILE", "With --protocol: the wheel of the tables, for more stacks.")]
Jobs = Annotated[int, opt("--jobs", "N", "With --protocol: number of processes.")]
EndToEnd = Annotated[bool, opt("--end-to-end", None, "Validate whole models: every published row, by engine and GPU.")]
Tables = Annotated[
    str, opt("--table", "LIST", "With --protocol: tables to validate, as a100,stacks,attention; or all.")
]
Seeds = Annotated[str, opt("--seeds", "LIST", "With --protocol: seeds of the splits; the mean is shown.")]
RowCounts = Annotated[str, opt("--rows", "LIST", "With --protocol: numbers of training rows; all for every row.")]


def command(
    profile: Profile = None,
    records: MaybeRecords = None,
    dtype: DtypeOnly = None,
    markdown: Markdown = None,
    html: Html = None,
    protocol: Protocol = False,
    table: Tables = "all",
    seeds: Seeds = "0,1,2",
    rows: RowCounts = "400,all",
    wheel: Wheel = None,
    jobs: Jobs = 2,
    end_to_end: EndToEnd = False,
    json: options.Json = False,
    figure: options.Figure = None,
) -> None:
    """Validate a profile with measurements.

    Predicts every record. Prints the errors of times and speedups next to two rooflines without a fit, and the coverage
    of the intervals. --protocol needs no profile: it splits each shipped table, fits on some rows and evaluates on
    shapes that the fit did not use; it excludes each software stack and predicts it from another, as shipped and
    re-anchored with 20 to 400 of its rows; and it compares the results with the acceptance criteria. --end-to-end
    predicts the published times and speedups of whole models, each in its engine.
    """
    if figure and not end_to_end:
        raise InputError("--figure: expected --end-to-end with it")
    if end_to_end:
        if profile or records or markdown or html or protocol:
            raise InputError(
                "--end-to-end: validates the published rows; expected no PROFILE, RECORDS or --protocol with it"
            )
        _end_to_end(render.Output(json, figures=[figure]), figure)
        return
    if protocol:
        if profile or records or markdown or html:
            unwanted = "PROFILE, RECORDS, --markdown or --html"
            raise InputError(f"--protocol: validates the shipped measurements; expected no {unwanted} with it")
        _protocol(table, seeds, rows, Path(wheel) if wheel else None, jobs, json)
        return
    if not profile or not records:
        example = "prunesim validate a100 a100_sxm/gemm/trtllm"
        raise InputError(f"expected a PROFILE and RECORDS, or --protocol, such as: {example}")
    from calibration.validation.scores import summary
    from calibration.validation.validate import validate
    from simulator.files.write import check_target
    from simulator.hardware.library import load_hardware

    for path in filter(None, (markdown, html)):
        check_target(path)
    hw = load_hardware(profile)
    found, notes = load_rows(records, hw)
    report = validate(hw, found, dtype=dtype)
    written = []
    if markdown:
        from calibration.validation.report import write_markdown

        written += [str(path) for path in write_markdown(report, markdown)[-1:]]
    if html:
        from calibration.validation.report import write_html

        written.append(str(write_html(report, html)))
    if render.Output(json).write([summary(report)]):
        show_report(report)
        for path in written:
            print(f"\n{path}")
    for line in notes:
        render.note(line)


def show_report(report: Report, title: str = "") -> None:
    """Print the accuracy of every section; a star marks rows that the profile was fitted on."""
    from calibration.validation.scores import part_summary

    parts = [part_summary(part) for part in report.parts]

    def percent(value: float | None) -> str:
        return "-" if value is None or value != value else f"{100 * value:.2f}"

    columns = render.columns(
        parts,
        ("<operator", lambda p: f"{p['operator']} {p['dtype']}{' *' if p['fitted_on_these_rows'] else ''}"),
        ("rows", lambda p: f"{p['rows']:,}"),
        ("MAPE\n%", lambda p: percent(p["errors"]["mape"])),
        ("median\n%", lambda p: percent(p["errors"]["median"])),
        ("p95\n%", lambda p: percent(p["errors"]["p95"])),
        ("bias\n%", lambda p: percent(p["errors"]["bias"])),
        ("speedup\nmedian %", lambda p: percent(p["speedup"].get("median"))),
        ("speedup\np95 %", lambda p: percent(p["speedup"].get("p95"))),
        ("coverage\n%", lambda p: percent(p["coverage"][0]["coverage"])),
        ("roofline\nMAPE %", lambda p: percent(p["roofline"]["mape"])),
        ("0.8 bw + 3 us\nMAPE %", lambda p: percent(p["simple"]["mape"])),
        ("<section", lambda p: p["status"]),
    )
    about = title or f"on measurements of {report.device}, {report.software}"
    render.show(render.narrowed(columns, 6), f"{report.hardware} {about}")
    if any(p["fitted_on_these_rows"] for p in parts):
        print("* the profile was fitted on these rows; errors on shapes that its folds did not use:")
        for name, values in report.accuracy.items():
            if any(name == f"{p['operator']} {p['dtype']}" for p in parts):
                shown = [f"{label} {percent(values.get(label.lower()))}" for label in ("MAPE", "median", "p95")]
                print(f"  {name}: {', '.join(shown)} %")
    for reason, count in report.skipped.items():
        render.note(f"{count} rows excluded: {reason}")


def _end_to_end(output: render.Output, figure: str | None) -> None:
    from dataclasses import asdict

    from calibration.validation.engines import KINDS, end_to_end, scatter, summaries

    found = end_to_end()
    lines = summaries(found)
    if output.write([asdict(line) for line in lines]):
        for kind in found:
            columns = render.columns(
                sorted((line for line in lines if line.kind == kind), key=lambda s: (s.engine, s.gpu, s.split)),
                ("<engine", lambda s: s.engine),
                ("<GPU", lambda s: s.gpu),
                ("<split", lambda s: s.split),
                ("rows", lambda s: s.rows),
                ("median error", lambda s: render.percent(s.median)),
                ("bias", lambda s: f"{100 * s.bias:+.1f} %"),
                ("coverage", lambda s: render.percent(s.inside)),
                ("half-width", lambda s: render.percent(s.half)),
            )
            render.show(columns, KINDS[kind])
            print()
        print("split: fit, source used to fit the engine's parameters; judge, other source")
        print("docs/engines.md also lists pruned models in other modelling code than the dense model")
    if figure:
        from simulator.figures.save import save_figure

        save_figure(scatter(found), figure)


def _protocol(table: str, seeds: str, rows: str, wheel: Path | None, jobs: int, json: bool) -> None:
    from calibration.validation.acceptance import against_bars
    from calibration.validation.accuracy import columns_of_table, run_protocol, titles

    sizes = [None if text == "all" else text for text in options.names("--rows", rows)]
    counts = [None if size is None else options.integers("--rows", size)[0] for size in sizes]
    if jobs < 1:
        raise InputError(f"--jobs: expected at least 1, got {jobs}")
    with render.progress("fitting and validating") as report:
        tables, splits = options.names("--table", table), options.integers("--seeds", seeds)
        found = run_protocol(tables, seeds=splits, sizes=counts, wheel=wheel, jobs=jobs, progress=report)
    asked = against_bars(found, published=table == "all")
    bars = [{"table": "asked", **vars(line)} for line in asked]
    if not render.Output(json).write([*found, *bars]):
        return
    for title in titles(found):
        columns = [
            render.Column(name.replace("ratio ", "ratio\n"), cells, right=name not in ("method", "left out"))
            for name, cells in columns_of_table(found, title)
        ]
        render.show(render.narrowed(columns, 6), title)
        print()
    marks = {None: "", True: "met", False: "MISSED"}
    columns = render.columns(
        asked,
        ("<criterion", lambda line: line.what),
        ("target", lambda line: line.asked),
        ("measured", lambda line: line.measured),
        ("<", lambda line: marks[line.met]),
    )
    render.show(columns, "acceptance criteria and measured values, %")
