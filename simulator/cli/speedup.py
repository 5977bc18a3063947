"""``prunesim speedup``: the table of predicted speedups, as text, JSON, CSV or figure."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from simulator.cli import options, render
from simulator.errors import InputError
from simulator.predict.words import setting_title, uncalibrated

if TYPE_CHECKING:
    from simulator.predict.rows import Record


def speedup(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="Name of a model, or its Hugging Face config.json (file or folder).")
    ],
    hardware: options.Hardware,
    family: Annotated[str, typer.Option("--family", metavar="LIST", help="Pruning families, or all.")] = "all",
    sparsity: Annotated[
        str, typer.Option("--sparsity", metavar="LIST", help="Fractions removed, each in [0, 1).")
    ] = "0.1,0.25,0.5",
    phase: options.Phase = "prefill",
    batch: options.Batch = "1",
    seq: options.Seq = "2048",
    new_tokens: options.NewTokens = 128,
    runtime: options.Runtime = "cuda_graph",
    dtype: options.Dtype = "bf16",
    weight_dtype: options.WeightDtype = None,
    kv_dtype: options.KvDtype = None,
    devices: options.Devices = 1,
    parallel: options.Parallel = "tensor",
    ideal: options.Ideal = False,
    option: options.Option = None,
    memory: Annotated[bool, typer.Option("--memory", help="Also show memory against the device's capacity.")] = False,
    json: options.Json = False,
    csv: Annotated[
        str | None, typer.Option("--csv", metavar="FILE", help="Write CSV, numbers in full (- for standard output).")
    ] = None,
    figure: options.Figure = None,
) -> None:
    """Predict how much faster a pruned model is.

    Every combination of the lists is predicted; one that a family does not support (2:4 at 0.25) is left out with a note, or refused
    when the family is named alone.
    """
    if json and csv:
        raise InputError("--json and --csv: expected one of them")
    if figure:
        from simulator.figures.save import check_figure

        check_figure(figure)
    if csv and csv != "-":
        from simulator.files.write import check_target, write_whole

        check_target(csv)
    chosen = options.names("--family", family)
    extra = options.settings("--option", option)
    if extra and (len(chosen) > 1 or chosen == ["all"]):
        raise InputError("--option: expected one family, for options belong to a family")
    from simulator.predict.table import table

    with render.progress("predicting") as report:
        found = table(
            [model],
            options.names("--hardware", hardware),
            chosen,
            options.fractions("--sparsity", sparsity),
            options.names("--phase", phase),
            options.integers("--batch", batch),
            options.integers("--seq", seq),
            setting=options.setting(new_tokens, runtime, dtype, weight_dtype, kv_dtype, devices, parallel),
            ideal=ideal,
            options=extra,
            progress=report,
        )
    if json:
        print(render.json_lines([asdict(r) for r in found]))
    elif csv == "-":
        print(render.csv_text([asdict(r) for r in found]), end="")
    elif csv:
        write_whole(csv, render.csv_text([asdict(r) for r in found]).encode())
    else:
        _print(found.records, memory)
    if figure:
        from simulator.cli.drawing import draw_speedups

        draw_speedups(found.records, figure)
    for line in (*found.notes, *uncalibrated(found.records)):
        render.note(line)


# -- text -------------------------------------------------------------------------------------------------------------------------


def _print(records: Sequence[Record], memory: bool) -> None:
    """One table for each setting, rows by family and sparsity, devices side by side."""
    groups: dict[str, list[Record]] = {}
    for r in records:
        groups.setdefault(setting_title(r), []).append(r)
    available = render.width()
    first = True
    for title, group in groups.items():
        for part in _chunks(group, available):
            if not first:
                print()
            render.show(render.first_fitting(speedup_layouts(part), available), title)
            first = False
        if memory:
            print()
            _print_memory(group, available)
    print(
        f"\nspeedup (its {render.percent(records[0].level)} interval); bounds leave out what the pruning itself adds;"
        "\nlimit: what holds most of the pruned model's time"
    )


def _chunks(records: Sequence[Record], available: int) -> Iterator[list[Record]]:
    """Records by as many devices side by side as fit in the narrowest layout with intervals, evenly spread."""
    names = list(dict.fromkeys(r.hardware for r in records))
    for tables in range(1, len(names) + 1):
        count = -(-len(names) // tables)
        parts = [[r for r in records if r.hardware in names[i : i + count]] for i in range(0, len(names), count)]
        if count == 1 or all(render.table_width(list(speedup_layouts(part))[-2]) <= available for part in parts):
            yield from parts
            return


def speedup_layouts(records: Sequence[Record]) -> Iterator[list[render.Column]]:
    """Layouts of a speedup table from the most detailed to the narrowest; the first row is the dense model."""
    hardware = list(dict.fromkeys(r.hardware for r in records))
    rows = list(dict.fromkeys((r.family, r.sparsity) for r in records))
    at = {(r.hardware, (r.family, r.sparsity)): r for r in records}
    any_of = {row: next(at[h, row] for h in hardware if (h, row) in at) for row in rows}
    dense = {h: next(r.dense_s for r in records if r.hardware == h) for h in hardware}
    seen: set[str] = set()
    labels = ["dense"]
    for name, _ in rows:
        labels.append("" if name in seen else name)
        seen.add(name)

    def shared(title: str, text: list[str]) -> render.Column:
        return render.Column(title, ["", *text])

    def layout(
        realised: bool, byte: bool, roofline: bool, times: bool, limit: str, interval: bool
    ) -> list[render.Column]:
        columns = [render.Column("family", labels, right=False), shared("pruned", [render.percent(s) for _, s in rows])]
        if realised:
            columns.append(shared("realised", [render.percent(any_of[row].realised_sparsity) for row in rows]))
        columns.append(shared("FLOP\nbound", [render.ratio(any_of[row].flop_bound) for row in rows]))
        if byte:
            columns.append(shared("byte\nbound", [render.ratio(any_of[row].byte_bound) for row in rows]))
        for h in hardware:
            found = [at.get((h, row)) for row in rows]
            if roofline:
                columns.append(shared("roofline\nbound", [render.ratio(r.roofline_bound) if r else "-" for r in found]))
            if times:
                columns.append(shared(f"{h}\ntime", [render.seconds(r.pruned_s) if r else "-" for r in found]))
            cells = [_speedup_cell(r, interval) for r in found]
            columns.append(
                render.Column(
                    f"{h}\nspeedup", [render.seconds(dense[h]), *cells], styles=["", *(_style(r) for r in found)]
                )
            )
            if limit:
                shown = render.LIMITS_SHORT if limit == "short" else {}
                columns.append(
                    render.Column(
                        "limit", ["", *(shown.get(r.limit, r.limit) if r else "" for r in found)], right=False
                    )
                )
        return columns

    yield layout(True, True, True, True, "full", True)
    yield layout(True, True, True, False, "full", True)
    yield layout(True, True, False, False, "full", True)
    yield layout(False, True, False, False, "full", True)
    yield layout(False, True, False, False, "short", True)
    yield layout(False, False, False, False, "short", True)
    yield layout(False, False, False, False, "", True)
    yield layout(False, False, False, False, "", False)


def _speedup_cell(r: Record | None, interval: bool) -> str:
    if r is None:
        return "-"
    return (
        f"{render.ratio(r.speedup)} ({render.ratio(r.speedup_lower)}-{render.ratio(r.speedup_upper)})"
        if interval
        else render.ratio(r.speedup)
    )


def _style(r: Record | None) -> str:
    """Green where the interval promises a gain, red where it promises a loss, plain where it says neither."""
    if r is None:
        return ""
    return "green" if r.speedup_lower > 1.0 else "red" if r.speedup_upper < 1.0 else ""


def _print_memory(records: Sequence[Record], available: int) -> None:
    """Memory of the dense and the pruned models against each device's capacity."""
    hardware = list(dict.fromkeys(r.hardware for r in records))
    rows = list(dict.fromkeys((r.family, r.sparsity) for r in records))
    at = {(r.hardware, (r.family, r.sparsity)): r for r in records}
    any_of = [next(at[h, row] for h in hardware if (h, row) in at) for row in rows]
    first = records[0]
    columns = [
        render.Column("family", ["dense", *(name for name, _ in rows)], right=False),
        render.Column("pruned", ["", *(render.percent(s) for _, s in rows)]),
        render.Column(
            "memory", [render.size(first.dense_memory_bytes), *(render.size(r.pruned_memory_bytes) for r in any_of)]
        ),
    ]
    for h in hardware:
        found = [at.get((h, row)) for row in rows]
        whole = next(r for r in records if r.hardware == h)
        cells = [
            "fits" if whole.dense_fits else "too large",
            *("-" if r is None else "fits" if r.pruned_fits else "too large" for r in found),
        ]
        columns.append(render.Column(f"{h}\n{render.size(whole.capacity_bytes)}", cells, right=False))
    per_device = " of each device" if first.devices > 1 else ""
    while len(columns) > 4 and render.table_width(columns) > available:
        columns.pop()
    render.show(columns, f"memory{per_device}: weights, cache, activations")
