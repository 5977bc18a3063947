"""``prunesim validate``: a profile against records, or the accuracy protocol over the shipped measurements."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from calibration.cli.rows import load_rows
from simulator.cli import options, render
from simulator.errors import InputError

if TYPE_CHECKING:
    from calibration.judge.validate import Report

Profile = Annotated[
    str | None, typer.Argument(metavar="PROFILE", help="Name, alias or YAML file of the profile to judge.")
]
RecordsArgument = Annotated[
    list[str] | None, typer.Argument(metavar="RECORDS...", help="Files, run folders, or names of shipped measurements.")
]
DtypeOnly = Annotated[
    str | None, typer.Option("--dtype", metavar="NAME", help="Number format to judge; all if left out.")
]
Markdown = Annotated[
    str | None, typer.Option("--markdown", metavar="FILE", help="Write a report with plots beside it.")
]
Html = Annotated[str | None, typer.Option("--html", metavar="FILE", help="Write a report with its plots in one file.")]
Protocol = Annotated[
    bool,
    typer.Option("--protocol", help="Fit and judge anew on splits of the shipped measurements, beside the baselines."),
]
Tables = Annotated[
    str,
    typer.Option(
        "--table", metavar="LIST", help="With --protocol: tables to judge, as a100,h100_fp8,attention; or all."
    ),
]
Seeds = Annotated[
    str, typer.Option("--seeds", metavar="LIST", help="With --protocol: seeds of the splits; their mean is shown.")
]
RowCounts = Annotated[
    str, typer.Option("--rows", metavar="LIST", help="With --protocol: training rows; all for every row there is.")
]


def command(
    profile: Profile = None,
    records: RecordsArgument = None,
    dtype: DtypeOnly = None,
    markdown: Markdown = None,
    html: Html = None,
    protocol: Protocol = False,
    table: Tables = "all",
    seeds: Seeds = "0,1,2",
    rows: RowCounts = "100,400,4000,all",
    json: options.Json = False,
) -> None:
    """Judge a profile by measurements.

    Predicts every record and prints the errors of times and of speedups, beside two rooflines without a fit, and how often the measured
    time lies in its interval. With --protocol no profile is needed: each shipped table is split, fitted on some rows and judged on (n, k)
    pairs the fit never saw.
    """
    if protocol:
        if profile or records or markdown or html:
            raise InputError(
                "--protocol: judges the shipped measurements; expected no PROFILE, RECORDS, --markdown or --html with it"
            )
        _protocol(table, seeds, rows, json)
        return
    if not profile or not records:
        raise InputError(
            "expected a PROFILE and RECORDS, or --protocol; for instance: prunesim validate a100 a100_sxm/gemm/trtllm"
        )
    from calibration.judge.scores import summary
    from calibration.judge.validate import validate
    from simulator.files.write import check_target
    from simulator.hardware.library import load_hardware

    for path in filter(None, (markdown, html)):
        check_target(path)
    hw = load_hardware(profile)
    found, notes = load_rows(records, hw)
    report = validate(hw, found, dtype=dtype)
    written = []
    if markdown:
        from calibration.judge.report import write_markdown

        written += [str(path) for path in write_markdown(report, markdown)[-1:]]
    if html:
        from calibration.judge.report import write_html

        written.append(str(write_html(report, html)))
    if json:
        print(render.json_lines([summary(report)]))
    else:
        show_report(report)
        for path in written:
            print(f"\n{path}")
    for line in notes:
        render.note(line)


def show_report(report: Report, title: str = "") -> None:
    """Print the accuracy of every part; a star marks rows the profile was fitted on."""
    from calibration.judge.scores import part_summary

    parts = [part_summary(part) for part in report.parts]

    def percent(value: float | None) -> str:
        return "-" if value is None or value != value else f"{100 * value:.2f}"

    columns = [
        render.Column(
            "operator",
            [f"{p['operator']} {p['dtype']}" + (" *" if p["fitted_on_these_rows"] else "") for p in parts],
            right=False,
        ),
        render.Column("rows", [f"{p['rows']:,}" for p in parts]),
        render.Column("MAPE\n%", [percent(p["errors"]["mape"]) for p in parts]),
        render.Column("median\n%", [percent(p["errors"]["median"]) for p in parts]),
        render.Column("p95\n%", [percent(p["errors"]["p95"]) for p in parts]),
        render.Column("bias\n%", [percent(p["errors"]["bias"]) for p in parts]),
        render.Column("speedup\nmedian %", [percent(p["speedup"].get("median")) for p in parts]),
        render.Column("speedup\np95 %", [percent(p["speedup"].get("p95")) for p in parts]),
        render.Column("in the\ninterval %", [percent(p["coverage"][0]["coverage"]) for p in parts]),
        render.Column("roofline\nMAPE %", [percent(p["roofline"]["mape"]) for p in parts]),
        render.Column("0.8 bw + 3 us\nMAPE %", [percent(p["simple"]["mape"]) for p in parts]),
        render.Column("section", [p["status"] for p in parts], right=False),
    ]
    while len(columns) > 6 and render.table_width(columns) > render.width():
        columns.pop()
    render.show(columns, f"{report.hardware} {title or f'on measurements of {report.device}, {report.software}'}")
    if any(p["fitted_on_these_rows"] for p in parts):
        print("* the profile was fitted on these rows; on shapes its folds had not seen:")
        for name, values in report.accuracy.items():
            if any(name == f"{p['operator']} {p['dtype']}" for p in parts):
                print(
                    f"  {name}: "
                    + ", ".join(f"{label} {percent(values.get(label.lower()))}" for label in ("MAPE", "median", "p95"))
                    + " %"
                )
    for reason, count in report.skipped.items():
        render.note(f"{count} rows left out: {reason}")


def _protocol(table: str, seeds: str, rows: str, json: bool) -> None:
    from calibration.judge.accuracy import columns_of_table, run_protocol, titles

    sizes = [None if text == "all" else text for text in options.names("--rows", rows)]
    counts = [None if size is None else options.integers("--rows", size)[0] for size in sizes]
    with render.progress("fitting and judging") as report:
        found = run_protocol(
            options.names("--table", table), seeds=options.integers("--seeds", seeds), sizes=counts, progress=report
        )
    if json:
        print(render.json_lines(found))
        return
    for number, title in enumerate(titles(found)):
        if number:
            print()
        columns = [
            render.Column(name, cells, right=name not in ("method", "unseen"))
            for name, cells in columns_of_table(found, title)
        ]
        while len(columns) > 6 and render.table_width(columns) > render.width():
            columns.pop()
        render.show(columns, title)
