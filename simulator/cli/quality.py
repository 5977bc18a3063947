"""``prunesim quality``: the perplexity of a real model under every pruning family, as a quality table."""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Annotated

import typer

from simulator.cli import options, render
from simulator.errors import InputError

if TYPE_CHECKING:
    from simulator.predict.quality import QualityTable


def quality(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Hugging Face folder, GGUF file, or smollm2-135m.")],
    output: Annotated[str, typer.Option("-o", "--output", metavar="FILE", help="Quality table to write (CSV).")],
    text: Annotated[
        str | None, typer.Option("--text", metavar="FILE", help="Text (UTF-8); that of pydoc topics if left out.")
    ] = None,
    windows: Annotated[int, typer.Option("--windows", metavar="N", help="Windows of text that are scored.")] = 8,
    calibration: Annotated[
        int, typer.Option("--calibration", metavar="N", help="Other windows that the criteria see.")
    ] = 8,
    length: Annotated[
        int, typer.Option("--length", metavar="N", help="Tokens of a window, half prompt, half scored.")
    ] = 1024,
    methods: Annotated[str, typer.Option("--methods", metavar="LIST", help="Methods, or all.")] = "all",
    sparsity: Annotated[str | None, typer.Option("--sparsity", metavar="LIST", help="Fractions removed.")] = None,
    name: Annotated[str, typer.Option("--name", metavar="NAME", help="Name of the model in the table.")] = "",
    threads: Annotated[
        int, typer.Option("--threads", metavar="N", help="Threads of PyTorch; 0 for its own choice.")
    ] = 0,
    json: options.Json = False,
) -> None:
    """Measure what pruning costs in quality, with a training-free method for every family.

    Needs torch, transformers, gguf and accelerate. A run that was stopped goes on where it was. The table is read by prunesim pareto
    --quality.
    """
    measured = _calibration("quality")
    chosen = () if methods == "all" else tuple(options.names("--methods", methods))
    fractions = tuple(options.fractions("--sparsity", sparsity)) if sparsity else ()
    plan = measured.Plan(windows, calibration, length, chosen, fractions)
    with render.progress("measuring") as bar:

        def report(done: int, total: int, what: str) -> None:
            bar(done, total)
            if not sys.stderr.isatty() and done % windows == 0:
                print(f"{done}/{total} {what}", file=sys.stderr, flush=True)

        table: QualityTable = measured.measure_quality(
            model, output, plan, text, name=name, threads=threads, progress=report
        )
    if json:
        from dataclasses import asdict

        print(
            render.json_lines(
                [{**asdict(r), "relative_loss": r.relative_loss, "options": dict(r.options)} for r in table.rows]
            )
        )
    else:
        _print(table)


def _calibration(module: str) -> ModuleType:
    """A module of the calibration package, which needs PyTorch; the simulator itself never does."""
    try:
        return importlib.import_module(f"calibration.execute.{module}")
    except ModuleNotFoundError as error:
        raise InputError(
            f"this command needs {error.name}; pip install 'prunesim[calibrate]' transformers gguf accelerate"
        ) from None


def _print(table: QualityTable) -> None:
    """The measured points by family."""
    rows = table.rows
    columns = [
        render.Column("method", [DENSE, *(r.method for r in rows)], right=False),
        render.Column("family", ["", *(r.family for r in rows)], right=False),
        render.Column("pruned", ["", *(render.percent(r.sparsity) for r in rows)]),
        render.Column("perplexity", [f"{rows[0].dense:.2f}", *(f"{r.pruned:.4g}" for r in rows)]),
        render.Column("loss", ["", *(render.percent(r.relative_loss) for r in rows)]),
    ]
    render.show(columns, f"{rows[0].model}: {rows[0].protocol}")


DENSE = "dense"
