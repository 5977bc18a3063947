"""``prunesim validate``: evaluate a profile on records, or run the accuracy protocol on the shipped measurements."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from calibration.cli.rows import load_rows
from simulator.cli import options, parsing, render
from simulator.cli.options import arg, opt
from simulator.errors import InputError

if TYPE_CHECKING:
    from calibration.validation.runs import RunResult
    from calibration.validation.validate import Report

# fmt: off
Profile = Annotated[str | None, arg("PROFILE", "Name, alias or YAML file of the profile to evaluate.")]
MaybeRecords = Annotated[list[str] | None, arg("RECORDS...", "Files, run folders, or names of shipped measurements.")]
DtypeOnly = Annotated[str | None, opt("--dtype", "NAME", "Number format to evaluate. Default: all.")]
Markdown = Annotated[str | None, opt("--markdown", "FILE", "Write a report, with plots in the same folder.")]
Html = Annotated[str | None, opt("--html", "FILE", "Write a report that contains its plots.")]
Protocol = Annotated[
    bool, opt("--protocol", None, "Fit and evaluate on splits of the shipped measurements, next to baselines.")
]
Wheel = Annotated[str | None, opt("--wheel", "FILE", "With --protocol: wheel of the tables, for more stacks.")]
Jobs = Annotated[int, opt("--jobs", "N", "With --protocol: number of processes.")]
EndToEnd = Annotated[
    bool, opt("--end-to-end", None, "Evaluate whole models on published measurements, by engine and GPU.")
]
Runs = Annotated[
    str | None,
    opt("--runs", "FOLDER", "With --end-to-end: your results of vllm bench, SGLang, trtllm-bench, genai-perf, AIPerf."),
]
ModelOf = Annotated[str, opt("--model", "MODEL", "With --runs: model of files that do not name a known one.")]
HardwareOf = Annotated[str, opt("--hardware", "NAME", "With --runs: GPU. Default: that of the file.")]
EngineOf = Annotated[str, opt("--engine", "NAME", "With --runs: engine. Default: that of the tool.")]
WeightsOf = Annotated[str, opt("--weight-dtype", "NAME", "With --runs: format of weights. Default: that of the file.")]
CacheOf = Annotated[str, opt("--kv-dtype", "NAME", "With --runs: format of the K/V cache. Default: that of the file.")]
DevicesOf = Annotated[int | None, opt("--devices", "N", "With --runs: GPUs that share the model. Default: 1.")]
BatchOf = Annotated[int | None, opt("--batch", "N", "With --runs: batch of files that do not state it.")]
SeqOf = Annotated[int | None, opt("--seq", "N", "With --runs: prompt tokens of files that do not state them.")]
NewOf = Annotated[
    int | None, opt("--new-tokens", "N", "With --runs: decode steps of files that do not state them; 0 is a prefill.")
]
Tables = Annotated[
    str, opt("--table", "LIST", "With --protocol: tables to evaluate, such as a100,stacks,attention; or all.")
]
Seeds = Annotated[str, opt("--seeds", "LIST", "With --protocol: seeds of the splits; means are printed.")]
RowCounts = Annotated[str, opt("--rows", "LIST", "With --protocol: numbers of training rows, or all.")]
# fmt: on


@dataclass(frozen=True)
class Given:
    """Conditions of result files (:class:`calibration.validation.runs.Conditions`)."""

    model: ModelOf = ""
    hardware: HardwareOf = ""
    engine: EngineOf = ""
    weight_dtype: WeightsOf = ""
    kv_dtype: CacheOf = ""
    devices: DevicesOf = None
    batch: BatchOf = None
    seq: SeqOf = None
    new_tokens: NewOf = None


@options.expanded()
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
    runs: Runs = None,
    given: Given = Given(),
    json: options.Json = False,
    figure: options.Figure = None,
    verbose: options.Verbose = False,
) -> None:
    """Evaluate a profile on measurements.

    Begins with whether the profile holds: errors next to a datasheet roofline, and coverage of the intervals. The exit
    status is 1 if it holds for no operator.
    Predicts every record and prints the errors of times and of speedups, the errors of two rooflines without a fit,
    and the coverage of the intervals. --protocol needs no profile: each shipped table is split, fitted on some rows
    and evaluated on held-out shapes; every software stack is held out and predicted from another stack, as shipped
    and after a local update with 20 to 400 of its rows; and the targets are printed next to the measured accuracy.
    --end-to-end predicts the published times and speedups of whole models, each in its engine; with --runs your own
    result files of serving benchmarks, each under its own conditions.
    """
    if runs is None and given != Given():
        raise InputError("--model, --hardware, --engine and other conditions: expected --end-to-end --runs with them")
    if runs is not None and (not end_to_end or figure):
        raise InputError("--runs: expected --end-to-end with it, and no --figure")
    if figure and not end_to_end:
        raise InputError("--figure: expected --end-to-end with it")
    if end_to_end:
        if profile or records or markdown or html or protocol:
            raise InputError(
                "--end-to-end: evaluates the published rows; expected no PROFILE, RECORDS or --protocol with it"
            )
        if runs is not None:
            _runs(runs, given, dtype or "", json, verbose)
            return
        _end_to_end(render.Output(json, figures=[figure]), figure)
        return
    if protocol:
        if profile or records or markdown or html:
            unwanted = "PROFILE, RECORDS, --markdown or --html"
            raise InputError(f"--protocol: evaluates the shipped measurements; expected no {unwanted} with it")
        _protocol(table, seeds, rows, Path(wheel) if wheel else None, jobs, json)
        return
    if not profile or not records:
        example = "prunesim validate a100 a100_sxm/gemm/trtllm"
        raise InputError(f"expected a PROFILE and RECORDS, or --protocol, such as: {example}")
    from calibration.fit.base_profile import thread_notes
    from calibration.validation.scores import summary
    from calibration.validation.validate import validate
    from calibration.validation.verdict import of_validation
    from simulator.files.write import check_target
    from simulator.hardware.library import load_hardware

    for path in filter(None, (markdown, html)):
        check_target(path)
    hw = load_hardware(profile)
    rows_, notes = load_rows(records, hw)
    report = validate(hw, rows_, dtype=dtype)
    notes = (*thread_notes(hw, report.device), *notes)
    written = []
    if markdown:
        from calibration.validation.report import write_markdown

        written += [str(path) for path in write_markdown(report, markdown)[-1:]]
    if html:
        from calibration.validation.report import write_html

        written.append(str(write_html(report, html)))
    judged = of_validation(report)
    if render.Output(json).write([judged.as_row() | summary(report)]):
        render.conclude(*judged.sentences)
        show_report(report)
        for path in written:
            print(f"\n{path}")
        notes = (*notes, *skipped_notes(report))
    render.notes(notes, verbose)
    if judged.status:
        raise typer.Exit(judged.status)


def skipped_notes(report: Report) -> tuple[str, ...]:
    """Return a note on the rows excluded for each reason."""
    return tuple(f"{count} rows excluded: {reason}" for reason, count in report.skipped.items())


def show_report(report: Report, title: str = "") -> None:
    """Print the accuracy of every part; a star marks rows of the profile's fit."""
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
        print("* the profile was fitted on these rows; on shapes held out of the fit:")
        for name, values in report.accuracy.items():
            if any(name == f"{p['operator']} {p['dtype']}" for p in parts):
                shown = [f"{label} {percent(values.get(label.lower()))}" for label in ("MAPE", "median", "p95")]
                print(f"  {name}: {', '.join(shown)} %")


def _end_to_end(output: render.Output, figure: str | None) -> None:
    from dataclasses import asdict

    from calibration.validation.engines import KINDS, end_to_end, of_end_to_end, scatter, summaries

    comparisons = end_to_end()
    lines = summaries(comparisons)
    if output.write([asdict(line) for line in lines]):
        render.conclude(*of_end_to_end(comparisons))
        for kind in comparisons:
            columns = render.columns(
                sorted((line for line in lines if line.kind == kind), key=lambda s: (s.engine, s.gpu, s.split)),
                ("<engine", lambda s: s.engine),
                ("<GPU", lambda s: s.gpu),
                ("<split", lambda s: s.split),
                ("rows", lambda s: s.rows),
                ("median error", lambda s: render.percent(s.median)),
                ("bias", lambda s: f"{100 * s.bias:+.1f} %"),
                ("coverage", lambda s: render.percent(s.coverage)),
                ("half-width", lambda s: render.percent(s.half_width)),
            )
            render.show(columns, KINDS[kind])
            print()
        print("split: fit, engine parameters were fitted on this source; judge, on other sources")
        print("rows whose pruned model needed custom modelling code are only in docs/generated/engines.md")
    if figure:
        from simulator.figures.style import save_figure

        save_figure(scatter(comparisons), figure)


def _runs(folder: str, given: Given, dtype: str, json: bool, verbose: bool) -> None:
    """Evaluate a folder of result files and print conclusion, one row per result, and notes."""
    from dataclasses import asdict

    from calibration.validation.runs import Conditions, evaluate, of_runs

    results = evaluate(folder, Conditions(**asdict(given), dtype=dtype))
    skipped = [f"{r.source}: skipped: {r.reason}" for r in results if r.compared is None]
    if len(skipped) == len(results):
        raise InputError(f"--runs {folder}: expected a result that can be predicted; {skipped[0]}")
    if render.Output(json).write([r.as_row() for r in results]):
        render.conclude(*of_runs(results, folder))
        render.show(
            render.narrowed(_run_columns(results), 6), "Measured and predicted times per pass (serve: per request)"
        )
    render.notes([*skipped, *(note for r in results for note in r.notes)], verbose)


def _run_columns(results: list[RunResult]) -> list[render.Column]:
    shown = [(r, r.compared) for r in results if r.compared is not None]
    return render.columns(
        shown,
        ("<file", lambda rc: rc[0].source),
        ("<model", lambda rc: rc[0].model),
        ("<GPU", lambda rc: rc[1].gpu),
        ("<engine", lambda rc: rc[1].engine),
        ("<request", lambda rc: rc[0].request),
        ("measured", lambda rc: render.seconds(rc[1].measured)),
        ("predicted", lambda rc: render.seconds_between(rc[1].predicted, rc[1].lower, rc[1].upper)),
        ("error", lambda rc: f"{100 * rc[1].error:+.1f} %"),
        ("inside", lambda rc: "yes" if rc[1].inside else "no"),
    )


def _protocol(table: str, seeds: str, rows: str, wheel: Path | None, jobs: int, json: bool) -> None:
    from calibration.validation.acceptance import against_targets, of_targets
    from calibration.validation.accuracy import run_protocol
    from calibration.validation.accuracy_tables import columns_of_table, titles

    sizes = [None if text == "all" else text for text in parsing.names("--rows", rows)]
    counts = [None if size is None else parsing.integers("--rows", size)[0] for size in sizes]
    if jobs < 1:
        raise InputError(f"--jobs: expected at least 1, got {jobs}")
    with render.progress("fitting and evaluating") as report:
        tables, splits = parsing.names("--table", table), parsing.integers("--seeds", seeds)
        scores = run_protocol(tables, seeds=splits, sizes=counts, wheel=wheel, jobs=jobs, progress=report)
    criteria = against_targets(scores, published=table == "all")
    if not render.Output(json).write([*scores, *({"table": "targets", **vars(c)} for c in criteria)]):
        return
    render.conclude(of_targets(criteria))
    for title in titles(scores):
        columns = [
            render.Column(name.replace("ratio ", "ratio\n"), cells, right=name not in ("method", "held out"))
            for name, cells in columns_of_table(scores, title)
        ]
        render.show(render.narrowed(columns, 6), title)
        print()
    marks = {None: "", True: "met", False: "NOT MET"}
    columns = render.columns(
        criteria,
        ("<criterion", lambda c: c.criterion),
        ("target", lambda c: c.target),
        ("measured", lambda c: c.measured),
        ("<", lambda c: marks[c.met]),
    )
    render.show(columns, "Acceptance targets and measured accuracy, %")
