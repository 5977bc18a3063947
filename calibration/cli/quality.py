"""``prunesim quality``: perplexity, KL divergence and acceptance of pruned models against their
dense model."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from simulator.cli import options, parsing, render
from simulator.cli.options import arg, option
from simulator.errors import InputError, needs_extra

if TYPE_CHECKING:
    from calibration.runners.quality import Score


@dataclass(frozen=True)
class PrunedModels:
    pruned: str | None = option(
        "FOLDER", "Pruned checkpoint to score; --family and --sparsity name what was removed."
    )
    family: str = option(
        "LIST", "Pruning families: the smallest weights are removed.", "depth,width"
    )
    sparsity: str = option("LIST", "Fractions removed.", "0.1,0.2")


@dataclass(frozen=True)
class Corpus:
    text: str | None = option("FILE", "Text to score (UTF-8). Default: Python's own help texts.")
    windows: int = option("N", "Windows of text.", 8)
    length: int = option("N", "Tokens per window.", 512)

    def read(self, folder: str) -> tuple[Any, str, str]:
        """Return the tokens of the windows, the name of the text, and the protocol."""
        from calibration.runners import quality

        content, name = quality.read_text(self.text)
        protocol = f"{self.windows} windows of {self.length} tokens, {name}, no fine-tuning"
        return (
            quality.load_windows(folder, content, self.windows, self.length),
            name,
            protocol,
        )


@options.expanded()
def command(
    model: Annotated[str, arg("MODEL", "Hugging Face folder of the dense model.", "FOLDER")],
    models: PrunedModels = PrunedModels(),
    output: str | None = option(
        "FILE",
        "CSV to write: a quality table, for prunesim pareto.",
        flags="-o --output",
    ),
    corpus: Corpus = Corpus(),
    json: options.Json = False,
) -> None:
    """Measure the quality of a small pruned model.

    Quality is perplexity, KL divergence to the dense model, and the share of tokens that the dense
    model accepts from the pruned one as a draft, sampled and greedy: a value for prunesim draft
    --acceptance. The model is pruned here, without fine-tuning, or read with --pruned. Needs torch
    and transformers. For accuracy on tasks use EleutherAI's lm-evaluation-harness: prunesim pareto
    reads its results.
    """
    from simulator.files.write import check_target, write_whole

    if output:
        check_target(output)
    fractions = parsing.fractions("--sparsity", models.sparsity)
    cases = [
        (name, fraction)
        for name in parsing.names("--family", models.family)
        for fraction in fractions
    ]
    if models.pruned and len(cases) != 1:
        raise InputError(
            "--pruned: expected one --family and one --sparsity, those of the checkpoint"
        )
    try:
        from calibration.runners import quality
    except ModuleNotFoundError as error:
        raise needs_extra("this command", "calibrate", str(error.name), " transformers") from None

    tokens, text_name, protocol = corpus.read(model)
    found: list[Score] = []
    with render.progress("measuring") as report:
        for score in quality.measure_quality(model, tokens, cases, models.pruned):
            found.append(score)
            report(len(found), len(cases))
    name = Path(model).resolve().name
    if output:
        from simulator.prediction.quality import table_text

        source = f"prunesim quality on {Path(models.pruned).name if models.pruned else name}"
        write_whole(
            output, table_text(s.row(name.lower(), protocol, source) for s in found).encode()
        )
    if options.Output(json).write([{"model": name, **asdict(s)} for s in found]):
        columns = render.columns(
            found,
            ("<family", "family"),
            ("pruned", "sparsity", render.percent),
            ("perplexity", lambda s: f"{s.perplexity:.4g}"),
            ("KL (nats/token)", lambda s: f"{s.kl_nats:.3g}"),
            ("accepted\nsampled", lambda s: f"{s.sampled_acceptance:.3f}"),
            ("accepted\ngreedy", lambda s: f"{s.greedy_acceptance:.3f}"),
        )
        render.show(
            columns, f"{name}: dense perplexity {found[0].dense_perplexity:.4g}, {text_name}"
        )
