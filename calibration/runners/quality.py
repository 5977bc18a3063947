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

from calibration.runners.decoder.model import Decoder
from calibration.runners.decoder.run import token_losses
from calibration.runners.quality_load import load_decoder
from calibration.runners.quality_methods import METHODS, apply, calibrate
from calibration.runners.quality_results import Results
from simulator.errors import InputError
from simulator.files.read import read_bounded
from simulator.files.write import check_target, write_whole
from simulator.models.library import list_models, load_model
from simulator.predict.quality import QualityRow, QualityTable, table_text
from simulator.predict.scenario import one_of

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
            one_of("method", name, list(METHODS))
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
    progress: Callable[[int, int, str], None] = lambda done, total, what: None,
) -> QualityTable:
    """Measure a model and write its quality table (CSV); an InputError where :func:`load_decoder` or :func:`read_text`
    cannot read.

    Finished points are kept beside the table until it is complete, and a rerun with the same settings goes on; points
    that were measured in another way are refused. ``name`` is the model's in the table: if left out, that of the
    shipped configuration of the same shape, else the file's. ``progress`` is called with windows done, windows in all,
    and what is running.
    """
    plan = plan or Plan()
    target = check_target(out)
    words, text_name = read_text(text)
    decoder, tokenizer, digest = load_decoder(model, threads)
    ids = torch.tensor(tokenizer(words, add_special_tokens=False, verbose=False).input_ids)
    calibration, evaluation = split_windows(ids, plan)
    start, points = plan.length // 2, plan.points()
    settings = {"windows": plan.windows, "calibration": plan.calibration, "length": plan.length}
    partial = target.with_name(target.name + ".partial.jsonl")
    total = len(calibration) + (1 + len(points)) * len(evaluation)
    done = 0

    def step(what: str) -> None:
        nonlocal done
        done += 1
        progress(done, total, what)

    seen = None
    with Results(partial, {"model": digest, "text": text_name, **settings}) as results:
        for method, fraction in [(DENSE, 0.0), *points]:
            if (method, fraction) in results.points:
                done += len(evaluation)
                continue
            changed, realised = decoder, 0.0
            if method != DENSE:
                seen = seen or calibrate(decoder, calibration, step)
                changed, realised = apply(method, decoder, fraction, seen)
            losses = []
            for window in evaluation:
                losses.append(float(token_losses(changed, window, start).mean()))
                step(f"{method} {100 * fraction:g} %" if fraction else method)
            results.add(method, fraction, realised, losses)
    protocol = (
        f"tokens {start}-{plan.length} of {plan.windows} windows, {text_name}, "
        f"calibrated on {plan.calibration} other windows, no fine-tuning"
    )
    label, source = name or known_name(decoder), f"measured by prunesim quality on {decoder.name} ({digest})"
    dense, rows = results.points[DENSE, 0.0]["losses"], []
    for method, fraction in points:
        point, family = results.points[method, fraction], METHODS[method].family
        perplexities = _perplexity(dense), _perplexity(point["losses"])
        error = f"standard error of the loss {_standard_error(dense, point['losses']):.4f}"
        note = f"realised {point['realised']:.4f}; {error}"
        what = method, family, label, fraction, "perplexity", False
        rows.append(QualityRow(*what, *perplexities, protocol, source, note=note))
    write_whole(target, table_text(rows).encode())
    partial.unlink(missing_ok=True)
    return QualityTable(tuple(rows), str(target))


def _standard_error(dense: Sequence[float], pruned: Sequence[float]) -> float:
    """Of the ratio of two perplexities, from the losses of the windows."""
    difference = [p - d for p, d in zip(pruned, dense, strict=True)]
    mean = sum(difference) / len(difference)
    spread = math.sqrt(sum((d - mean) ** 2 for d in difference) / max(len(difference) - 1, 1) / len(difference))
    return math.exp(mean) * spread


def _perplexity(losses: Sequence[float]) -> float:
    return math.exp(min(sum(losses) / len(losses), 700.0))


def known_name(decoder: Decoder) -> str:
    """The shipped model configuration with the decoder's shape, or the file's name."""
    attention, mlp = decoder.layers[0].attention, decoder.layers[0].mlp
    assert attention is not None
    assert mlp is not None
    shape = (decoder.hidden, len(decoder.layers), attention.heads, attention.kv_heads, len(mlp.up.weight))
    for name in list_models():
        c = load_model(name)
        if (*shape, len(decoder.embedding)) == (c.hidden, c.layers, c.heads, c.kv_heads, c.inner, c.vocab):
            return name
    return decoder.name
