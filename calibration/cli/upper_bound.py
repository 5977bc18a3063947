"""``prunesim upper-bound``: the measured theoretical upper bound of pruning a model on a device."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from calibration.cli.measure import Budget, Dtype, Folder, Hardware, Seed, describe, finish
from calibration.cli.rows import seconds
from simulator.cli import options, render

if TYPE_CHECKING:
    from calibration.execute.upper_bound import Bound
    from calibration.measure.run import Progress

DeviceName = Annotated[str, typer.Option("--device", metavar="DEVICE", help="cpu, cuda, cuda:1 or replay:FILE.")]
Model = Annotated[str, typer.Argument(metavar="MODEL", help="Name of a model, or its Hugging Face config.json.")]
Family = Annotated[str, typer.Option("--family", metavar="LIST", help="Pruning families, or all.")]
Sparsity = Annotated[str, typer.Option("--sparsity", metavar="LIST", help="Fractions removed.")]
Layers = Annotated[int | None, typer.Option("--layers", metavar="N", help="Cut the model to its first N layers.")]


def command(
    model: Model,
    device: DeviceName,
    output: Folder,
    phase: options.Phase = "prefill,decode",
    batch: options.Batch = "1",
    seq: options.Seq = "2048",
    family: Family = "all",
    sparsity: Sparsity = "0.25,0.5",
    budget: Budget = "5min",
    dtype: Dtype = "bf16",
    hardware: Hardware = "",
    layers: Layers = None,
    runtime: options.Runtime = "cuda_graph",
    seed: Seed = 0,
    json: options.Json = False,
) -> None:
    """Measure the upper bound of pruning a model.

    Times dense GEMMs at the dense and at the pruned shapes: what the device grants at best. Writes RUN/records.jsonl and
    RUN/upper_bound.csv; the same command goes on where it was stopped.
    """
    from calibration.devices import open_device
    from calibration.execute.cases import fewer_layers, profile_of, settings_of
    from calibration.execute.upper_bound import bound_errors, bounds, measure_bounds
    from calibration.measure.runs import check_folder
    from simulator.files.write import write_whole
    from simulator.models.library import load_model
    from simulator.predict.settings import Setting

    budget_s = seconds("--budget", budget)
    cases, notes = settings_of(
        fewer_layers(load_model(model), layers),
        phases=options.names("--phase", phase),
        batch=options.integers("--batch", batch),
        seq=options.integers("--seq", seq),
        families=options.names("--family", family),
        sparsities=options.fractions("--sparsity", sparsity),
        setting=Setting(dtype=dtype, runtime=runtime),
    )
    check_folder(output)
    opened = open_device(device)
    try:
        start = opened.clock()
        hw = profile_of(output, opened, dtype, hardware)
        left = max(budget_s - (opened.clock() - start), 1e-3)
        with render.progress("measuring") as report:
            found = measure_bounds(
                output, opened, cases, budget_s=left, dtype=dtype, seed=seed, progress=_shown(report), say=render.note
            )
    finally:
        opened.close()
    rows = bounds(cases, found.records, hw, runtime=runtime, dtype=dtype)
    file = Path(output) / "upper_bound.csv"
    write_whole(file, render.csv_text([asdict(row) for row in rows]).encode())
    if json:
        print(render.json_lines([asdict(row) for row in rows]))
    else:
        show_bounds(rows)
        if errors := bound_errors(rows):
            again = (
                ""
                if errors["predicted"] == errors["model"]
                else f"; its model without the exact shapes {100 * errors['model']:.1f} %"
            )
            print(f"\nmedian error of the bounds predicted by {hw.name}: {100 * errors['predicted']:.1f} %{again}")
        print(f"\n{file}: {found.shapes} shapes; {describe(found.outcome)}")
    for line in notes:
        render.note(line)
    if missing := sum(1 for row in rows if row.missing):
        render.note(
            f"{missing} of {len(rows)} cases lack shapes and have no measured bound; the same command with more --budget goes on"
        )
    finish(found.outcome)


def _shown(report: Callable[[int, int], None]) -> Callable[[Progress], None]:
    """Progress in seconds: operators differ too much in cost to be counted."""
    return lambda p: report(round(p.elapsed_s), max(round(p.elapsed_s + p.remaining_s), 1))


def show_bounds(rows: list[Bound]) -> None:
    """Print the bounds as a table."""

    def ratios(name: str) -> list[str]:
        return ["-" if getattr(r, name) != getattr(r, name) else render.ratio(getattr(r, name)) for r in rows]

    first = rows[0]
    several = len({(r.batch, r.seq) for r in rows}) > 1
    columns = [
        render.Column("family", [r.family for r in rows], right=False),
        render.Column("sparsity", [f"{r.sparsity:g}" for r in rows]),
        render.Column("phase", [r.phase for r in rows], right=False),
        *([render.Column("batch\nx seq", [f"{r.batch} x {r.seq}" for r in rows])] if several else []),
        render.Column("measured\nbound", ratios("measured_bound")),
        render.Column("the same\npredicted", ratios("predicted_bound")),
        render.Column("roofline\nbound", ratios("roofline_bound")),
        render.Column("FLOP\nbound", ratios("flop_bound")),
        render.Column("byte\nbound", ratios("byte_bound")),
        render.Column("predicted\nspeedup", ratios("predicted")),
        render.Column(
            "dense\nGEMMs", [render.seconds(r.dense_gemm_s) if r.dense_gemm_s == r.dense_gemm_s else "-" for r in rows]
        ),
    ]
    where = "" if several else f", batch {first.batch}, seq {first.seq}"
    render.show(columns, f"{first.model} on {first.device}, {first.dtype}{where}; predicted by {first.hardware}")
