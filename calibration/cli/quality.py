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
    from calibration.runners.quality import LayerScore, Score


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

    def read(self, folder: str, times: int = 1) -> tuple[Any, str, str]:
        """Return tokens of ``times`` x ``windows`` windows, the name of the text, and the
        protocol."""
        from calibration.runners import quality

        content, name = quality.read_text(self.text)
        protocol = f"{self.windows} windows of {self.length} tokens, {name}, no fine-tuning"
        return (
            quality.load_windows(folder, content, times * self.windows, self.length),
            name,
            protocol,
        )


@options.expanded()
def command(
    model: Annotated[str, arg("MODEL", "Hugging Face folder of the dense model.", "FOLDER")],
    models: PrunedModels = PrunedModels(),
    output: str | None = option(
        "FILE",
        "CSV to write: a quality table, for prunesim pareto, or the scores of --per-layer.",
        flags="-o --output",
    ),
    per_layer: bool = option(
        None, "Score each variant of each layer's attention and MLP alone, into --output.", False
    ),
    choices: str | None = option(
        "FILE", "With --per-layer: variants of each layer (CSV). Default: usual ones."
    ),
    corpus: Corpus = Corpus(),
    json: options.Json = False,
) -> None:
    """Measure the quality of a small pruned model.

    Quality is perplexity, KL divergence to the dense model, and the share of tokens that the dense
    model accepts from the pruned one as a draft, sampled and greedy: a value for prunesim draft
    --acceptance. The model is pruned here, without fine-tuning, or read with --pruned. With
    --per-layer, one sublayer at a time is replaced by each of its variants: attention with fewer KV
    heads (means of joined heads), an MLP with fewer channels (those with the largest mean output on
    other text), or none; run the command again to resume. Needs torch and transformers. For
    accuracy on tasks use EleutherAI's lm-evaluation-harness: prunesim pareto reads its results.
    """
    from simulator.files.write import check_target, write_whole

    if output:
        check_target(output)
    if per_layer:
        if models != PrunedModels():
            raise InputError(
                "--per-layer: expected no --pruned, --family or --sparsity; --choices lists"
                " variants"
            )
        if not output:
            raise InputError("--per-layer: expected --output with the file of the scores")
    elif choices:
        raise InputError("--choices: expected --per-layer with it")
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
    if per_layer and output:
        _per_layer(model, choices, output, corpus, options.Output(json))
        return

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


def _per_layer(
    folder: str, choices: str | None, file: str, corpus: Corpus, output: options.Output
) -> None:
    from calibration.runners import quality
    from simulator.models.library import load_model
    from simulator.plans.library import generated_library, read_library

    config, name = load_model(folder), Path(folder).resolve().name
    library = read_library(choices, config) if choices else generated_library(config)
    changes = quality.changes_of(library)
    tokens, text_name, protocol = corpus.read(folder, 2)  # every other window selects channels
    decoder = quality.decoder_of(quality.load_model(folder), name)
    source = f"prunesim quality --per-layer on {name} ({quality.weights_digest(decoder)})"
    rows = quality.read_scores(file, protocol, source)
    done = {row.key for row in rows}
    todo = sum(key not in done for key in (quality.DENSE, *(change.key for change in changes)))
    if done:
        render.status(f"{file}: {len(rows)} rows exist; {todo} left")
    with render.progress("measuring") as report:
        found = quality.measure_layers(decoder, tokens[::2], tokens[1::2], changes, done)
        for i, row in enumerate(found, 1):
            rows.append(row)
            quality.write_scores(file, rows, protocol, source)
            report(i, todo)
    if output.write([asdict(row) for row in rows]):
        dense = next(row for row in rows if row.key == quality.DENSE)
        title = (
            f"{name}: KL divergence (nats/token) of one changed sublayer; dense perplexity"
            f" {dense.perplexity:.4g}"
        )
        render.show(_by_layer(rows), f"{title}, {text_name}")


def _by_layer(rows: list[LayerScore]) -> list[render.Column]:
    """Return the table of divergences: a row per layer, a column per variant."""
    found: dict[str, dict[int, str]] = {}
    for row in (row for row in rows if row.layer.isdigit()):
        title = f"attention\n{row.attention}" if row.mlp == "dense" else f"MLP\n{row.mlp}"
        found.setdefault(title, {})[int(row.layer)] = f"{row.kl_div:.3g}"
    titles = sorted(found, key=lambda title: title.startswith("MLP"))
    columns = ((title, lambda layer, at=found[title]: at.get(layer, "-")) for title in titles)
    return render.columns(
        sorted({layer for at in found.values() for layer in at}), ("layer", str), *columns
    )
