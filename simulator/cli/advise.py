"""``prunesim advise``: find the least pruning that reaches a target."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from simulator.cli import options, parsing, render
from simulator.cli.options import opt
from simulator.errors import InputError

if TYPE_CHECKING:
    from simulator.prediction.advise import Advised

MOST_ROWS = 5  # of the table of one setting without --verbose


# fmt: off
@dataclass(frozen=True)
class Aim:
    target: Annotated[str | None, opt("--target", "X", "Target speedup, above 1, such as 1.5 or 1.5x.")] = None
    latency: Annotated[str | None, opt("--latency", "TIME", "Or the target time of a pass, such as 12ms.")] = None
    tokens_per_s: Annotated[float | None, opt(
        "--tokens-per-s", "X", "Or the target of new tokens/s over all sequences.")] = None
    confidence: Annotated[float, opt("--confidence", "P", "Minimum probability of reaching the target.")] = 0.5


@options.expanded("csv", "figure")
def command(
    model: options.Model,
    devices: options.Devices = options.DEVICES,
    aim: Aim = Aim(),
    family: Annotated[str | None, opt("--family", "LIST", "Pruning families to consider. Default: all.")] = None,
    write: Annotated[str | None, opt(
        "--write", "FOLDER", "Write FOLDER/FAMILY/config.json for depth, width and both, where they reach it.")] = None,
    run: options.Run = options.RUN,
    out: options.Output = options.OUTPUT,
) -> None:
    # fmt: on
    """Find the least sparsity of each family, and of depth with width, that reaches a target.

    Begins with the least pruning and its probability, or with the closest pruning. The table has the best families of
    one device, engine and request, or the best family of each of several; --verbose prints every family. For a plan
    per layer use prunesim search.
    """
    from simulator.prediction.advise import Target, advise
    from simulator.prediction.sentences import of_advice, uncalibrated

    asked = run.asked(model)
    if sum(given is not None for given in (aim.target, aim.latency, aim.tokens_per_s)) != 1:
        raise InputError("--target, --latency, --tokens-per-s: expected one of them")
    target = Target(
        None if aim.target is None else parsing.speedup_target("--target", aim.target),
        None if aim.latency is None else parsing.duration("--latency", aim.latency),
        aim.tokens_per_s,
    )
    names = None if family is None else parsing.names("--family", family)
    found = advise(model, devices.profiles, target, names, probability=aim.confidence, **asked.settings)
    written = _written(write, model, found) if write else []
    if not render.Output(out.json).write(found.rows()):
        return
    render.conclude(" ".join(filter(None, of_advice(found, target))))
    _table(found, out.verbose)
    results = [a.result for a in found.advice if out.verbose or a.reached]
    render.notes((*asked.notes, *written, *uncalibrated(results), *found.notes), out.verbose)


def _table(found: Advised, verbose: bool) -> None:
    from simulator.prediction.sentences import probability_text, settings_of

    groups = settings_of(found.advice)
    one = len(groups) == 1
    shown = [a for a in found.advice if a.reached][:MOST_ROWS] if one else [group[0] for group in groups.values()]
    rows = found.advice if verbose else shown or found.advice[:1]
    if not rows:
        return
    columns = render.columns(
        rows,
        ("<setting", lambda a: a.result.request),
        ("<least pruning", lambda a: a.result.pruning),
        ("realised", lambda a: render.percent(a.result.realised_sparsity)),
        ("<target", lambda a: "reached" if a.reached else "missed"),
        ("speedup", lambda a: render.interval(a.result)),
        ("probability", lambda a: probability_text(a.probability)),
        ("time", lambda a: render.seconds(a.result.pruned_s)),
        ("<bottleneck", lambda a: a.result.bottleneck),
    )
    render.show(render.narrowed(columns[1:] if one else columns, 5))


def _written(folder: str, model: str, found: Advised) -> list[str]:
    """Write the configurations of the families that reach the target in the one setting; return notes on the files."""
    from simulator.models.changes import write_config
    from simulator.prediction.runnable import config_of
    from simulator.prediction.sentences import settings_of
    from simulator.pruning import FAMILIES

    if (many := len(settings_of(found.advice)) + len(found.dense)) > 1:
        raise InputError(f"--write: expected one device, engine and request, got {many}")
    written, notes = [], []
    for r in (a.result for a in found.advice if a.reached):
        if any(FAMILIES[name].loading != "config" for name in r.family.split("+")):
            continue
        try:
            content = config_of(model, r)
        except InputError as error:
            notes.append(f"{r.family}: not written: {error}")
            continue
        write_config(Path(folder) / r.family, content)
        written.append(r.family)
    first = f"written: {folder}/{{{','.join(written)}}}/config.json" if written else f"{folder}: nothing is written"
    return [first, *notes]
