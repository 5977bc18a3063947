"""``prunesim costs``: price every variant of every layer."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from simulator.cli import options, parsing, render
from simulator.cli.options import opt
from simulator.errors import InputError

if TYPE_CHECKING:
    from simulator.plans.costs import Costs

MOST_ROWS = 24  # of the table without --verbose


# fmt: off
@options.expanded()
def command(
    model: options.Model,
    hardware: options.Hardware,
    choices: Annotated[str | None, opt(
        "--choices", "FILE", "Variants: YAML, or a file as --scores of search. Default: the usual ones.")] = None,
    output: Annotated[str | None, opt(
        "-o --output", "FILE", "Write all costs: .csv, .parquet, or .json as ModelOpt's subblock_stats.json "
        "(with --phase generate).")] = None,
    run: options.Run = options.RUN,
    json: options.Json = False,
    verbose: options.Verbose = False,
) -> None:
    # fmt: on
    """Price every variant of every layer, for a search.

    A variant is attention with fewer KV heads or query heads, an MLP of another width, fewer experts, a linear product,
    or none. Its cost is the difference of a pass with it and a pass without that attention or MLP, in the engine, with
    host time that is not hidden, and with its interval. Layers with equal shapes cost the same and share a row. -o
    writes a row per layer. As subblock_stats.json, with --phase generate, it has the prefill and decode times that
    ModelOpt's Puzzletron needs for its latency targets.
    """
    requested = run.requests()
    if output is not None:
        _checked(output, requested.phase)
    from simulator.plans.costs import costs

    axes = {name: getattr(requested, name) for name in ("engine", "phase", "batch", "seq", "scenario")}
    with render.progress("pricing") as report:
        found = costs(model, parsing.names("--hardware", hardware), choices, **axes, progress=report)
    lines = []
    if output is not None:
        _write(found, output)
        lines.append(f"written: {output}: {len(found)} costs")
    if not render.Output(json).write(found.rows):
        return
    groups = _together(found)
    render.conclude(_conclusion(found))
    rows = groups if verbose else groups[:MOST_ROWS]
    several = len(found.settings) > 1
    place = [
        ("<hardware", lambda row: row["hardware"]),
        ("<engine", lambda row: row["engine"]),
        ("<request", lambda row: f"{row['phase']} {row['batch']} x {row['seq']}"),
    ]
    columns = render.columns(
        rows,
        *(place if several else ()),
        ("<layers", lambda row: row["layers"]),
        ("<part", lambda row: row["sublayer"]),
        ("<variant", lambda row: row["variant"]),
        ("time of a layer", lambda row: render.seconds_between(row["seconds"], row["lower"], row["upper"], short=True)),
        ("of dense", lambda row: render.percent(row["share"])),
        ("parameters", lambda row: f"{row['parameters']:,.0f}"),
        ("cache", lambda row: render.size(row["cache_bytes"])),
    )
    hidden = f"; {len(groups) - len(rows)} more rows with --verbose" if len(groups) > len(rows) else ""
    title = f"{found.model.name}{'' if several else f' on {found.settings[0]}'}: costs with {found.level:.0%} intervals"
    render.show(render.narrowed(columns, 5 + 3 * several), title + hidden)
    render.notes((*requested.notes, *lines), verbose)


def _checked(output: str, phases: Sequence[str]) -> None:
    """Reject a target of an unknown format or in a missing folder before any work."""
    from simulator.files.write import check_target

    kind = Path(output).suffix
    if kind not in (".csv", ".json", ".parquet"):
        raise InputError(f"--output {output}: expected a name that ends in .csv, .json or .parquet")
    if kind == ".json" and (alone := {"prefill", "decode"} & set(phases)):
        wanted = "expected --phase generate, because ModelOpt needs prefill and decode times"
        raise InputError(f"--output {output}: {wanted}, got {min(alone)}")
    check_target(output)


def _write(found: Costs, output: str) -> None:
    from simulator.files.write import write_whole

    kind = Path(output).suffix
    if kind == ".parquet":
        from simulator.files.parquet import load_pyarrow

        pa, pq = load_pyarrow()
        out = io.BytesIO()
        pq.write_table(pa.table({name: column.tolist() for name, column in found.columns.items()}), out)
        content = out.getvalue()
    elif kind == ".json":
        from simulator.plans.write import stats_text

        content = stats_text(found).encode()
    else:
        from simulator.files.csv import csv_text

        content = csv_text(found.rows).encode()
    write_whole(output, content)


def _together(found: Costs) -> list[dict[str, Any]]:
    """Return the costs with equal layers in one row, and each as a share of its dense sublayer, which comes first."""
    from simulator.models.difference import runs

    layers, rows, dense = dict[tuple[object, ...], list[int]](), dict[tuple[object, ...], dict[str, Any]](), 0.0
    for row in found.rows:
        dense = row["seconds"] if row["variant"] == "dense" else dense
        values = tuple(value for name, value in row.items() if name != "layer")
        layers.setdefault(values, []).append(row["layer"])
        rows.setdefault(values, row | {"share": row["seconds"] / dense if dense else 0.0})
    together = [row | {"layers": runs(layers[key]) if row["layer"] >= 0 else "-"} for key, row in rows.items()]
    return [row for row in together if row["variant"] != "none"]  # which costs nothing


def _conclusion(found: Costs) -> str:
    """Return the shares of attention, MLPs and the rest in a pass of the first setting."""
    first = [row for row in found.rows[: len(found) // len(found.settings)] if row["variant"] == "dense"]
    whole = sum(row["seconds"] for row in first)
    names = ("attention", "mlp", "outside")
    parts = [sum(row["seconds"] for row in first if row["sublayer"] == name) / whole for name in names]
    attention, mlp, rest = map(render.percent, parts)
    text = f"attention takes {attention}, MLPs {mlp} and what is outside the layers {rest}"
    return f"{found.model.name} takes {render.seconds(whole)} on {found.settings[0]}: {text}."
