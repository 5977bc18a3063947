"""``prunesim compare``: run a decoder dense and pruned on a device, and put predictions and bounds beside what it took."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from calibration.cli.measure import Budget, Dtype, Folder, Hardware, Seed
from calibration.cli.rows import seconds
from calibration.cli.upper_bound import DeviceName, Family, Layers, Model, Sparsity
from simulator.cli import options, render

if TYPE_CHECKING:
    from calibration.execute.comparison import Row

Runtime = Annotated[
    str,
    typer.Option(
        "--runtime", metavar="NAME", help="How decode steps are launched: cuda_graph or eager; what can be if left out."
    ),
]


def command(
    model: Model,
    device: DeviceName,
    output: Folder,
    phase: options.Phase = "prefill,decode",
    batch: options.Batch = "1",
    seq: options.Seq = "2048",
    family: Family = "all",
    sparsity: Sparsity = "0.25,0.5",
    budget: Budget = "10min",
    dtype: Dtype = "bf16",
    hardware: Hardware = "",
    layers: Layers = None,
    runtime: Runtime = "",
    seed: Seed = 0,
    json: options.Json = False,
) -> None:
    """Compare predicted with measured speedups.

    Runs a real decoder with random weights, dense and pruned by each family. The profile is RUN/profile.yaml where a calibration left
    one, unless --hardware names another. Writes RUN/decoder.jsonl, comparison.csv, comparison.md and comparison.png; the same command
    goes on where it was stopped.
    """
    from calibration.devices import open_device
    from calibration.execute.cases import fewer_layers, profile_of, settings_of
    from calibration.execute.compare import as_executed, compare
    from calibration.execute.comparison import rows_of, table
    from calibration.execute.upper_bound import measured_bounds
    from calibration.measure.runs import RECORDS, check_folder
    from simulator.files.write import write_whole
    from simulator.models.library import load_model
    from simulator.predict.settings import Setting, one_of

    budget_s = seconds("--budget", budget)
    if runtime:
        one_of("runtime", runtime, ("cuda_graph", "eager"))
    config = fewer_layers(load_model(model), layers)
    cases, notes = settings_of(
        config,
        phases=options.names("--phase", phase),
        batch=options.integers("--batch", batch),
        seq=options.integers("--seq", seq),
        families=options.names("--family", family),
        sparsities=options.fractions("--sparsity", sparsity),
        setting=Setting(dtype=dtype),
        options=as_executed(device),
    )
    folder = check_folder(output)
    opened = open_device(device)
    try:
        name = opened.describe().device
        render.note(f"{name}; {opened.describe().software}; {dtype}; {len(cases)} cases")
        start = opened.clock()
        hw = profile_of(folder, opened, dtype, hardware)
        left = max(budget_s - (opened.clock() - start), 1e-3)
        with render.progress("running") as report:
            found = compare(
                folder, opened, config, cases, budget_s=left, dtype=dtype, runtime=runtime, seed=seed, progress=report
            )
    finally:
        opened.close()
    known = measured_bounds(folder / RECORDS, cases, dtype)
    rows = rows_of(cases, found.records, hw, device=name, dtype=dtype, measured_bounds=known)
    if rows:
        write_whole(folder / "comparison.csv", render.csv_text(table(rows)).encode())
        _write(folder, rows, list(found.records))
    if json:
        print(render.json_lines(table(rows)))
    elif rows:
        render.show(_columns(rows), _title(rows[0]))
        print("\n" + "\n".join(_agreement(rows, list(found.records))))
        print(f"\n{folder / 'comparison.md'}")
    for line in (*notes, *found.notes):
        render.note(line)
    if found.left:
        render.note(
            f"{found.left} cases left{f' ({found.stopped})' if found.stopped else ''}; the same command goes on from here"
        )
    if found.stopped not in ("", "budget") or not rows:
        raise typer.Exit(130 if found.stopped == "interrupted" else 1)


def _title(row: Row) -> str:
    return f"{row.model} on {row.device}, {row.dtype}: predicted by {row.hardware} against measured"


def _columns(rows: list[Row]) -> list[render.Column]:
    def ratios(name: str) -> list[str]:
        return ["-" if getattr(r, name) != getattr(r, name) else render.ratio(getattr(r, name)) for r in rows]

    several = len({(r.batch, r.seq) for r in rows}) > 1
    bound = any(r.measured_bound == r.measured_bound for r in rows)
    return [
        render.Column("family", [r.family for r in rows], right=False),
        render.Column("sparsity", [f"{r.sparsity:g}" for r in rows]),
        render.Column("phase", [r.phase for r in rows], right=False),
        *([render.Column("batch\nx seq", [f"{r.batch} x {r.seq}" for r in rows])] if several else []),
        render.Column("dense", [render.seconds(r.dense_s) for r in rows]),
        render.Column("pruned", [render.seconds(r.pruned_s) for r in rows]),
        render.Column("measured\nspeedup", ratios("measured")),
        render.Column("predicted", ratios("predicted")),
        render.Column(
            "interval", [f"{render.ratio(r.predicted_lower)}-{render.ratio(r.predicted_upper)}" for r in rows]
        ),
        render.Column("error\n%", [f"{100 * r.error:+.1f}" for r in rows]),
        *([render.Column("measured\nbound", ratios("measured_bound"))] if bound else []),
        render.Column("roofline\nbound", ratios("roofline_bound")),
        render.Column("FLOP\nbound", ratios("flop_bound")),
    ]


def _agreement(rows: list[Row], records: list[dict[str, object]]) -> list[str]:
    """How well they agree, a line a phase."""
    from calibration.execute.comparison import by_phase, repeatability

    lines = []
    for phase, a in by_phase(rows).items():
        rank = f"Spearman {a.spearman:.3f}, " if a.spearman == a.spearman else ""
        lines.append(
            f"{phase}: {rank}median error {100 * a.median:.1f} %, p95 {100 * a.p95:.1f} %, bias {100 * a.bias:+.1f} %, "
            f"{100 * a.inside:.0f} % of {a.count} in their 90 % interval; dense times off by {100 * a.dense_time:.1f} % (median)"
        )
    again = repeatability(records)
    if again == again:
        lines.append(f"measured again, a speedup of this machine differs by {100 * again:.1f} % (median)")
    return lines


def _write(folder: Path, rows: list[Row], records: list[dict[str, object]]) -> None:
    """The table as Markdown, and the figure."""
    from calibration.execute.compare_figure import compare_figure
    from simulator.figures.save import save_figure
    from simulator.files.write import write_whole

    columns = _columns(rows)
    lines = [
        f"# {_title(rows[0])}",
        "",
        *(f"- {line}" for line in _agreement(rows, records)),
        "",
        "![](comparison.png)",
        "",
    ]
    lines.append("| " + " | ".join(c.title.replace("\n", " ") for c in columns) + " |")
    lines.append("| " + " | ".join("---:" if c.right else "---" for c in columns) + " |")
    lines += ["| " + " | ".join(c.cells[i] for c in columns) + " |" for i in range(len(rows))]
    write_whole(folder / "comparison.md", ("\n".join(lines) + "\n").encode())
    save_figure(compare_figure(rows), folder / "comparison.png")
