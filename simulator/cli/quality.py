"""``prunesim quality``: the perplexity of a real model under every pruning family, as a quality table."""

from __future__ import annotations

import importlib
import sys
from dataclasses import asdict
from types import ModuleType
from typing import TYPE_CHECKING, Annotated

from simulator.cli import options, render
from simulator.cli.options import arg, opt
from simulator.errors import needs_extra

if TYPE_CHECKING:
    from simulator.predict.quality import QualityTable


# fmt: off
Model = Annotated[str, arg("MODEL", "Hugging Face folder, GGUF file, or smollm2-135m.", "FILE")]
Output = Annotated[str, opt("-o --output", "FILE", "Quality table to write (CSV).")]
Text = Annotated[str | None, opt("--text", "FILE", "Text (UTF-8); that of pydoc topics if left out.")]
Windows = Annotated[int, opt("--windows", "N", "Windows of text that are scored.")]
Calibration = Annotated[int, opt("--calibration", "N", "Other windows that the criteria see.")]
Length = Annotated[int, opt("--length", "N", "Tokens of a window, half prompt, half scored.")]
Methods = Annotated[str, opt("--methods", "LIST", "Methods, or all.")]
Sparsity = Annotated[str | None, opt("--sparsity", "LIST", "Fractions removed.")]
Name = Annotated[str, opt("--name", "NAME", "Name of the model in the table.")]
Threads = Annotated[int, opt("--threads", "N", "Threads of PyTorch; 0 for its own choice.")]
# fmt: on


def quality(
    model: Model,
    output: Output,
    text: Text = None,
    windows: Windows = 8,
    calibration: Calibration = 8,
    length: Length = 1024,
    methods: Methods = "all",
    sparsity: Sparsity = None,
    name: Name = "",
    threads: Threads = 0,
    json: options.Json = False,
) -> None:
    """Measure what pruning costs in quality, with a training-free method for every family.

    Needs torch, transformers, gguf and accelerate. A run that was stopped goes on where it was. The table is read by
    prunesim pareto --quality.
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
    rows = [{**asdict(r), "relative_loss": r.relative_loss, "options": dict(r.options)} for r in table.rows]
    if render.Output(json).write(rows):
        _print(table)


def _calibration(module: str) -> ModuleType:
    """A module of the calibration package, which needs PyTorch; the simulator itself never does."""
    try:
        return importlib.import_module(f"calibration.runners.{module}")
    except ModuleNotFoundError as error:
        raise needs_extra("this command", "calibrate", str(error.name), " transformers gguf accelerate") from None


def _print(table: QualityTable) -> None:
    """The measured points by family."""
    rows = table.rows
    columns = [
        render.Column("method", ["dense", *(r.method for r in rows)], right=False),
        render.Column("family", ["", *(r.family for r in rows)], right=False),
        render.Column("pruned", ["", *(render.percent(r.sparsity) for r in rows)]),
        render.Column("perplexity", [f"{rows[0].dense:.2f}", *(f"{r.pruned:.4g}" for r in rows)]),
        render.Column("loss", ["", *(render.percent(r.relative_loss) for r in rows)]),
    ]
    render.show(columns, f"{rows[0].model}: {rows[0].protocol}")
