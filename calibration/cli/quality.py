"""``prunesim quality``: perplexity and KL divergence of pruned models against their dense model."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from simulator.cli import options, render
from simulator.cli.options import arg, opt
from simulator.errors import InputError, needs_extra

if TYPE_CHECKING:
    from calibration.runners.quality import Score

# fmt: off
Model = Annotated[str, arg("MODEL", "Hugging Face folder of the dense model.", "FOLDER")]
Pruned = Annotated[
    str | None,
    opt("--pruned", "FOLDER", "Pruned checkpoint to score; --family and --sparsity name what was removed."),
]
Output = Annotated[str | None, opt("-o --output", "FILE", "Quality table to write (CSV), for prunesim pareto.")]
Family = Annotated[str, opt("--family", "LIST", "Pruning families: the smallest weights are removed.")]
Sparsity = Annotated[str, opt("--sparsity", "LIST", "Fractions removed.")]
Text = Annotated[str | None, opt("--text", "FILE", "Text to score (UTF-8). Default: Python's own help texts.")]
Windows = Annotated[int, opt("--windows", "N", "Windows of text.")]
Length = Annotated[int, opt("--length", "N", "Tokens per window.")]
# fmt: on


def command(
    model: Model,
    pruned: Pruned = None,
    output: Output = None,
    family: Family = "depth,width",
    sparsity: Sparsity = "0.1,0.2",
    text: Text = None,
    windows: Windows = 8,
    length: Length = 512,
    json: options.Json = False,
) -> None:
    """Measure perplexity and KL divergence of a small pruned model against its dense model.

    The model is pruned here, without fine-tuning, or read with --pruned. Needs torch and transformers. For accuracy on
    tasks use EleutherAI's lm-evaluation-harness: prunesim pareto reads its results.
    """
    from simulator.files.write import check_target, write_whole

    if output:
        check_target(output)
    fractions = options.fractions("--sparsity", sparsity)
    cases = [(name, fraction) for name in options.names("--family", family) for fraction in fractions]
    if pruned and len(cases) != 1:
        raise InputError("--pruned: expected one --family and one --sparsity, those of the checkpoint")
    try:
        from calibration.runners import quality
    except ModuleNotFoundError as error:
        raise needs_extra("this command", "calibrate", str(error.name), " transformers") from None

    content, text_name = quality.read_text(text)
    tokens = quality.load_windows(model, content, windows, length)
    found: list[Score] = []
    with render.progress("measuring") as report:
        for score in quality.measure_quality(model, tokens, cases, pruned):
            found.append(score)
            report(len(found), len(cases))
    name = Path(model).resolve().name
    if output:
        from simulator.prediction.quality import table_text

        protocol = f"{windows} windows of {length} tokens, {text_name}, no fine-tuning"
        source = f"prunesim quality on {Path(pruned).name if pruned else name}"
        write_whole(output, table_text(s.row(name.lower(), protocol, source) for s in found).encode())
    if render.Output(json).write([{"model": name, **asdict(s)} for s in found]):
        columns = render.columns(
            found,
            ("<family", lambda s: s.family),
            ("pruned", lambda s: render.percent(s.sparsity)),
            ("perplexity", lambda s: f"{s.perplexity:.4g}"),
            ("KL (nats/token)", lambda s: f"{s.kl_nats:.3g}"),
        )
        render.show(columns, f"{name}: dense perplexity {found[0].dense_perplexity:.4g}, {text_name}")
