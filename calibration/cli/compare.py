"""``prunesim compare``: run a dense and a pruned decoder on a device and compare their times with
predictions."""

from __future__ import annotations

import math
import sys
import textwrap
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from calibration.cli.calibrate import EngineRun, Folder, in_format, restart_if_needed
from calibration.cli.upper_bound import SETTINGS, CaseOptions, case_columns, ratio_of
from simulator.cli import options, render
from simulator.cli.options import option
from simulator.files.csv import csv_text
from simulator.request import Name

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from calibration.runners.compare import ComparedSpeedup


REQUESTS: options.Run = options.run_options(*SETTINGS, phase="prefill,decode", dtype=None)


@dataclass(frozen=True)
class Runner(EngineRun):
    engine: str = option(
        "NAME",
        "What runs the model: reference (our decoder), hf or compile (Transformers), vllm.",
        "reference",
    )


@options.expanded("csv", "figure")
def command(
    model: options.Model,
    output: Folder,
    device: str = option("DEVICE", "cpu, cuda or cuda:1.", options.REQUIRED),
    run: options.Run = REQUESTS,
    selection: CaseOptions = CaseOptions(budget="10min"),  # noqa: B008 - frozen
    runner: Runner = Runner(),
    width: options.Width = None,
    font: options.Font = None,
    out: options.Output = options.OUTPUT,
) -> None:
    """Compare predicted with measured speedups.

    Begins with whether the predictions hold, next to the roofline bound as prediction, and the
    worst case. Runs a model with random weights, dense and pruned: our own decoder, which has the
    families that decide during a pass, the model of Transformers, eagerly (hf) or under
    torch.compile (compile), or that of vLLM. The profile is --hardware, else
    RUN/profile.yaml of a calibration. Writes RUN/decoder.jsonl, comparison.csv, comparison.md and
    comparison.png, for a library with the name of its engine. Run the command again to resume. The
    default of --dtype is bf16, or fp32 on a CPU without bf16 instructions.
    """
    from calibration.runners.cases import ModelRun
    from calibration.runners.compare import (
        ENGINES,
        compare,
        conclusions,
        doubts,
        file_name,
        kernels_on,
        rows_of,
    )
    from calibration.runners.runs import RECORDS, check_folder
    from calibration.runners.upper_bound import measured_bounds
    from simulator.figures.style import PaperSize
    from simulator.files.write import write_whole
    from simulator.models.write import content_of

    size, run = PaperSize.read(width, font), in_format(run, device)
    dtype, engine = run.text("dtype"), runner.engine
    runs, folder = ENGINES[Name(tuple(ENGINES)).check("--engine", engine)], check_folder(output)
    settings = {**run.asked().settings, "engine": runs.lowered}
    config, cases, notes = selection.cases(model, settings, kernels_on(device), runs.phases)
    with (
        selection.opened(device, folder, dtype) as (opened, hw, left),
        render.progress("running") as report,
    ):
        name = opened.describe().device
        render.status(
            f"{name}; {opened.describe().software}; {dtype}; {runs.title}; {len(cases)} cases"
        )
        python = runner.vllm_python or sys.executable
        how = ModelRun(config, dtype, engine, content_of(model), python, selection.seed)
        found = compare(folder, opened, how, cases, left, report)
    restart_if_needed(found, render.status)
    bounds = measured_bounds(folder / RECORDS, cases, dtype)
    rows = rows_of(
        cases, found.records, hw, device=name, dtype=dtype, engine=engine, measured_bounds=bounds
    )
    table, agreement, title = [asdict(row) for row in rows], _agreement(rows), ""
    if rows:
        title = (
            f"{rows[0].model} on {name}, {dtype}: predicted ({rows[0].hardware}) against measured"
        )
        write_whole(folder / file_name("comparison.csv", engine), csv_text(table).encode())
        with size.applied():
            _write(folder, engine, rows, title, agreement)
    if out.write(table) and rows:
        render.conclude(*conclusions(rows))
        render.show(_columns(rows), title)
        print("\n" + "\n".join(agreement))
        print(f"\n{folder / file_name('comparison.md', engine)}")
    why = f" ({found.stopped})" if found.stopped else ""
    left_over = (
        (f"{found.left} cases left{why}; run the command again to resume",) if found.left else ()
    )
    render.notes((*left_over, *found.notes, *doubts(rows), *notes), out.verbose)
    if found.stopped not in ("", "budget") or not rows:
        raise typer.Exit(130 if found.stopped == "interrupted" else 1)


def _columns(rows: list[ComparedSpeedup]) -> list[render.Column]:
    measured = [] if all(math.isnan(r.measured_bound) for r in rows) else ["measured"]
    return render.columns(
        rows,
        *case_columns(rows),
        ("dense", "dense_s", render.seconds),
        ("pruned", "pruned_s", render.seconds),
        ("measured\nspeedup", ratio_of("measured")),
        (
            "measured\ninterval",
            lambda r: f"{render.ratio(r.measured_lower)}-{render.ratio(r.measured_upper)}",
        ),
        ("predicted", ratio_of("predicted")),
        (
            "interval",
            lambda r: f"{render.ratio(r.predicted_lower)}-{render.ratio(r.predicted_upper)}",
        ),
        ("error\n%", lambda r: f"{100 * r.error:+.1f}"),
        *(
            (f"{name}\nbound", ratio_of(f"{name.lower()}_bound"))
            for name in (*measured, "roofline", "FLOP")
        ),
        *(
            (f"{kind}energy\nsaved %", partial(_saved, prefix=prefix))
            for kind, prefix in (("", ""), ("predicted ", "predicted_"))
            if any(math.isfinite(r.energy_saved) for r in rows)
        ),
    )


def _saved(r: ComparedSpeedup, prefix: str) -> str:
    value, low, high = (
        f"{100 * getattr(r, f'{prefix}energy_saved{end}'):.1f}" for end in ("", "_lower", "_upper")
    )
    return f"{value} ({low}-{high})"


def _agreement(rows: list[ComparedSpeedup]) -> list[str]:
    from calibration.runners.compare import by_phase, known_within, of_energies

    lines = []
    for phase, a in by_phase(rows).items():
        rank = "" if math.isnan(a["spearman"]) else f"Spearman {a['spearman']:.3f}, "
        errors = (
            f"median error {100 * a['median']:.1f} %, p95 {100 * a['p95']:.1f} %, bias"
            f" {100 * a['bias']:+.1f} %"
        )
        inside = f"{100 * a['inside']:.0f} % of {a['count']} in their 90 % interval"
        dense = f"median error of dense times {100 * a['dense_time']:.1f} %"
        lines.append(f"{phase}: {rank}{errors}, {inside}; {dense}")
    lines += of_energies(rows)
    if not math.isnan(within := known_within(rows)):
        known = f"known within {100 * within:.1f} % (median half-width of {len(rows)} intervals)"
        lines.append(f"measured speedups are {known}")
    return lines


def _write(
    folder: Path, engine: str, rows: list[ComparedSpeedup], title: str, agreement: list[str]
) -> None:
    from calibration.runners.compare import file_name
    from calibration.validation.scoring import table
    from simulator.display import markdown_text
    from simulator.figures.style import save_figure
    from simulator.files.write import write_whole

    columns, figure = _columns(rows), folder / file_name("comparison.png", engine)
    cells = [[markdown_text(c.cells[i]) for c in columns] for i in range(len(rows))]
    left = [at for at, c in enumerate(columns) if not c.right]
    lines = [
        f"# {markdown_text(title)}",
        "",
        *(f"- {line}" for line in agreement),
        "",
        f"![]({figure.name})",
        "",
    ]
    lines.append(table([c.title.replace("\n", " ") for c in columns], cells, left))
    write_whole(folder / file_name("comparison.md", engine), ("\n".join(lines) + "\n").encode())
    save_figure(comparison_figure(rows), figure)


def comparison_figure(rows: list[ComparedSpeedup]) -> Figure:
    """Draw measured next to predicted speedups: a panel per phase and sparsity; with texts of
    --prune, per phase."""
    from simulator.figures.measured import Beside, published_figure

    simple = all(r.simple for r in rows)
    names = {
        r.prune: r.family if simple else textwrap.fill(r.pruning, 24, break_on_hyphens=False)
        for r in rows
    }
    labels, fields = (
        [*dict.fromkeys(names.values())],
        ("measured", "predicted", "predicted_lower", "predicted_upper"),
    )
    panels = []
    for phase, sparsity in dict.fromkeys((r.phase, r.sparsity if simple else None) for r in rows):
        at = {
            names[r.prune]: r for r in rows if r.phase == phase and sparsity in (None, r.sparsity)
        }
        values = [
            [getattr(at[name], field) if name in at else math.nan for name in labels]
            for field in fields
        ]
        title = phase if sparsity is None else f"{phase}, {render.percent(sparsity)} removed"
        panels.append(Beside(title, labels, *values))
    return published_figure(panels, observed="measured")
