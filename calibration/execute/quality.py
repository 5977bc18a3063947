"""What pruning costs in quality: perplexity of a real causal language model under every family, without fine-tuning.

Use :func:`measure_quality`. Each window of text is a prompt and its continuation; the perplexity is that of the
continuation, so that methods that drop prompt tokens or cached positions share the axis with those that change weights.
Criteria see calibration text only, which is disjoint from the evaluation text. Every finished point is on disk before
the next one begins, and a rerun goes on from there.
"""

from __future__ import annotations

import hashlib
import math
import platform
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from calibration.execute.decoder import Decoder, token_losses
from calibration.execute.quality_load import Loaded, load_decoder
from calibration.execute.quality_methods import METHODS, apply, calibrate
from calibration.execute.quality_results import Results
from simulator.errors import InputError, unknown
from simulator.files.read import read_bounded
from simulator.files.write import check_target, write_whole
from simulator.models.library import list_models, load_model
from simulator.predict.quality import QualityRow, QualityTable, table_text

DENSE = "dense"


@dataclass(frozen=True)
class Plan:
    """What is measured: windows that are scored, windows that criteria are computed on, methods, fractions removed."""

    windows: int = 8
    calibration: int = 8
    length: int = 1024  # tokens of a window; the first half is the prompt, the second half is scored
    methods: tuple[str, ...] = ()  # names in METHODS; empty for all
    fractions: tuple[float, ...] = ()  # empty for those of each method

    def __post_init__(self) -> None:
        for name, least in (("windows", 1), ("calibration", 1), ("length", 64)):
            if getattr(self, name) < least:
                raise InputError(f"{name} {getattr(self, name)}: expected a whole number from {least} up")
        for name in self.methods:
            if name not in METHODS:
                raise unknown("method", name, METHODS)
        for fraction in self.fractions:
            if not 0.0 < fraction < 1.0:
                raise InputError(f"sparsity {fraction:g}: expected a fraction in (0, 1), such as 0.25")

    def points(self) -> list[tuple[str, float]]:
        """Every method with its fractions; 2:4 has only one."""
        return [
            (name, fraction)
            for name in self.methods or METHODS
            for fraction in (METHODS[name].family != "semi_structured" and self.fractions) or METHODS[name].fractions
        ]


def read_text(path: str | Path | None = None) -> tuple[str, str]:
    """Text to measure on, and its name: a UTF-8 file, or the English of ``pydoc_data.topics``, which Python ships.

    Paragraphs that occur twice are kept once, so that no text is in both halves.

    >>> text, name = read_text()
    >>> len(text) > 100_000, name.startswith("pydoc topics")
    (True, True)
    """
    if path is None:
        from pydoc_data.topics import topics

        name = f"pydoc topics of Python {platform.python_version()}"
        raw = "\n\n".join(topics[key] for key in sorted(topics))
    else:
        try:
            raw, name = read_bounded(path).decode("utf-8"), Path(path).name
        except UnicodeDecodeError as error:
            raise InputError(f"{path}: cannot be read as UTF-8 text: {error}") from None
    paragraphs = dict.fromkeys(p.strip("\n") for p in raw.split("\n\n") if p.strip())
    text = "\n\n".join(paragraphs)
    return text, f"{name} ({hashlib.sha256(text.encode()).hexdigest()[:8]})"


def split_windows(ids: Tensor, plan: Plan) -> tuple[list[Tensor], list[Tensor]]:
    """Calibration windows from the first half of a text, evaluation windows from the second, evenly spread.

    >>> calibration, evaluation = split_windows(torch.arange(1000), Plan(windows=2, calibration=3, length=100))
    >>> [int(w[0]) for w in calibration], [int(w[0]) for w in evaluation]
    ([0, 200, 400], [500, 900])
    """
    half = len(ids) // 2

    def spread(begin: int, end: int, many: int) -> list[Tensor]:
        room = end - begin - plan.length
        if room < (many - 1) * plan.length:
            need = 2 * max(plan.windows, plan.calibration) * plan.length
            raise InputError(f"text of {len(ids)} tokens: too short; expected at least {need} for these windows")
        starts = [begin + (room * i // (many - 1) if many > 1 else 0) for i in range(many)]
        return [ids[s : s + plan.length] for s in starts]

    return spread(0, half, plan.calibration), spread(half, len(ids), plan.windows)


def measure_quality(
    model: str | Path,
    out: str | Path,
    plan: Plan | None = None,
    text: str | Path | None = None,
    *,
    name: str = "",
    threads: int = 0,
    progress: Callable[[int, int, str], None] | None = None,
) -> QualityTable:
    """Measure a model and write its quality table.

    Parameters
    ----------
    model : str or Path
        See :func:`calibration.execute.quality_load.load_decoder`, also for ``threads``.
    out : str or Path
        The table (CSV). Finished points are kept beside it until the table is complete, and a rerun with the same
        settings goes on.
    plan : Plan, optional
    text : str or Path, optional
        See :func:`read_text`.
    name : str
        Name of the model in the table; if left out, that of the shipped configuration with the same shape, else the
        file's.
    progress : callable, optional
        Called with windows done, windows in all, and what is running.

    Raises
    ------
    InputError
        For a model or text that cannot be read, or points on disk that were measured in another way.
    """
    plan = plan or Plan()
    target = check_target(out)
    words, text_name = read_text(text)
    loaded = load_decoder(model, threads)
    decoder = loaded.decoder
    ids = torch.tensor(loaded.tokenizer(words, add_special_tokens=False, verbose=False).input_ids)
    calibration, evaluation = split_windows(ids, plan)
    start, points = plan.length // 2, plan.points()
    settings = {"windows": plan.windows, "calibration": plan.calibration, "length": plan.length}
    results = Results(
        target.with_name(target.name + ".partial.jsonl"), {"model": loaded.digest, "text": text_name, **settings}
    )
    total = len(calibration) + (1 + len(points)) * len(evaluation)
    done = 0

    def step(what: str) -> None:
        nonlocal done
        done += 1
        if progress is not None:
            progress(done, total, what)

    seen = None
    with results:
        for method, fraction in [(DENSE, 0.0), *points]:
            if results.has(method, fraction):
                done += len(evaluation)
                continue
            changed, realised = decoder, 0.0
            if method != DENSE:
                if seen is None:
                    seen = calibrate(decoder, calibration, lambda i, n: step("calibration"))
                changed, realised = apply(method, decoder, fraction, seen)
            losses = []
            for window in evaluation:
                losses.append(float(token_losses(changed, window, start).mean()))
                step(f"{method} {100 * fraction:g} %" if fraction else method)
            results.add(method, fraction, realised, losses)
    scored = f"tokens {start}-{plan.length} of {plan.windows} windows, {text_name}"
    protocol = f"{scored}, calibrated on {plan.calibration} other windows, no fine-tuning"
    label = name or known_name(decoder)
    rows = tuple(_row(method, fraction, label, protocol, loaded, results) for method, fraction in points)
    write_whole(target, table_text(rows).encode())
    results.path.unlink(missing_ok=True)
    return QualityTable(rows, str(target))


def _row(method: str, fraction: float, model: str, protocol: str, loaded: Loaded, results: Results) -> QualityRow:
    dense, pruned = results.losses(DENSE, 0.0), results.losses(method, fraction)
    difference = [p - d for p, d in zip(pruned, dense, strict=True)]
    mean = sum(difference) / len(difference)
    spread = math.sqrt(sum((d - mean) ** 2 for d in difference) / max(len(difference) - 1, 1) / len(difference))
    realised = results.points[method, fraction]["realised"]
    return QualityRow(
        method,
        METHODS[method].family,
        model,
        fraction,
        "perplexity",
        False,
        _perplexity(dense),
        _perplexity(pruned),
        protocol,
        f"measured by prunesim quality on {loaded.decoder.name} ({loaded.digest})",
        note=f"realised {realised:.4f}; standard error of the loss {math.exp(mean) * spread:.4f}",
    )


def _perplexity(losses: Sequence[float]) -> float:
    return math.exp(min(sum(losses) / len(losses), 700.0))


def known_name(decoder: Decoder) -> str:
    """The shipped model configuration with the decoder's shape, or the file's name."""
    attention, mlp = decoder.layers[0].attention, decoder.layers[0].mlp
    assert attention is not None
    assert mlp is not None
    heads, inner = (attention.heads, attention.kv_heads), len(mlp.up.weight)
    shape = (decoder.hidden, len(decoder.layers), *heads, inner, len(decoder.embedding))
    for name in list_models():
        c = load_model(name)
        if shape == (c.hidden, c.layers, c.heads, c.kv_heads, c.inner, c.vocab):
            return name
    return decoder.name
