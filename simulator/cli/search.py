"""``prunesim advise``, ``search`` and ``costs``: find the least pruning that reaches a target,
choose a variant of each layer under targets, price every variant."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from simulator.cli import options, parsing, render
from simulator.cli.options import option
from simulator.errors import InputError
from simulator.units import parameters, parse_parameters, parse_quantity, parse_ratio

if TYPE_CHECKING:
    from simulator.plans.costs import Costs
    from simulator.plans.search import Plan
    from simulator.prediction.advise import Advised

MOST_FAMILIES = 5  # rows of the table of one setting without --verbose
MOST_POINTS = 8  # plans of the frontier in the table without --verbose
MOST_ROWS = 24  # rows of the table of costs without --verbose


@dataclass(frozen=True)
class Scored:
    scores: str | None = option(
        "FILE",
        "Scores per layer and variant: a CSV of your own, or smollm2-135m, which ships.",
    )
    metric: str = option("NAME", "Column of the scores, if several could be scores.", "")
    maximise: bool = option(None, "A higher value of the metric is better.", False)
    uniform: bool = option(
        None, "One shape for all remaining layers, which stock engines load.", False
    )


_seconds = partial(parse_quantity, unit="s")
PARSERS: Mapping[str, tuple[str, Callable[[str], float]]] = {
    "target": ("speedup", parse_ratio),
    "latency": ("latency_s", _seconds),
    "ttft": ("ttft_s", _seconds),
    "tpot": ("tpot_s", _seconds),
    "memory": ("memory_bytes", partial(parse_quantity, unit="B")),
    "params": ("parameters", parse_parameters),
}
"""Option -> the name of its target, and the parser of its text."""


@dataclass(frozen=True)
class Aim:
    target: str | None = option("X", "Least speedup, above 1, such as 1.5 or 1.5x.")
    latency: str | None = option("TIME", "Longest time of a pass, such as 12ms.")
    tokens_per_s: float | None = option("X", "Fewest new tokens/s over all sequences.")
    confidence: float = option("P", "Least probability of reaching each target on time.", 0.5)

    def parsed(self) -> dict[str, float]:
        """Return the targets by their names in Python."""
        texts = {
            option: text for option in PARSERS if (text := getattr(self, option, None)) is not None
        }
        found = {
            PARSERS[n][0]: parsing.checked(f"--{n}", text, PARSERS[n][1])
            for n, text in texts.items()
        }
        return found if self.tokens_per_s is None else found | {"tokens_per_s": self.tokens_per_s}


@dataclass(frozen=True)
class Wanted(Aim):
    ttft: str | None = option("TIME", "Longest time to first token, such as 500ms.")
    tpot: str | None = option("TIME", "Longest time per further token, such as 30ms.")
    memory: str | None = option("SIZE", "Most memory on the fullest device, such as 40GiB.")
    params: str | None = option("N", "Most parameters, such as 49B.")


@options.expanded("csv", "figure")
def advise(
    model: options.Model,
    devices: options.Devices = options.DEVICES,
    aim: Aim = Aim(),
    family: str | None = option("LIST", "Pruning families to consider. Default: all."),
    write: str | None = option(
        "FOLDER", "Write FOLDER/FAMILY/config.json for depth, width and both, where they reach it."
    ),
    run: options.Run = options.RUN,
    out: options.Output = options.OUTPUT,
) -> None:
    """Find the least sparsity of each family, and of depth with width, that reaches a target.

    Begins with the least pruning and its probability, or with the closest pruning. The table has
    the best families of one device, engine and request, or the best family of each of several;
    --verbose prints every family. For a plan per layer use prunesim search.
    """
    from simulator.prediction.advise import Target
    from simulator.prediction.advise import advise as advised
    from simulator.prediction.advise_sentences import of_advice
    from simulator.prediction.notes import uncalibrated

    asked = run.asked(model, devices)
    if len(given := aim.parsed()) != 1:
        raise InputError("--target, --latency, --tokens-per-s: expected one of them")
    target = Target(**given)
    names = None if family is None else parsing.names("--family", family)
    found = advised(
        model, devices.profiles, target, names, probability=aim.confidence, **asked.settings
    )
    written = _configurations(write, model, found) if write else []
    if not out.write(found.rows()):
        return
    render.conclude(" ".join(of_advice(found, target)))
    _families(found, out.verbose)
    results = [a.result for a in found.advice if out.verbose or a.reached]
    render.notes((*asked.notes, *written, *uncalibrated(results), *found.notes), out.verbose)


def _families(found: Advised, verbose: bool) -> None:
    from simulator.prediction.advise_sentences import of_budgets, settings_of
    from simulator.prediction.wording import probability_text

    groups = settings_of(found.advice)
    one = len(groups) == 1
    shown = (
        [a for a in found.advice if a.reached][:MOST_FAMILIES]
        if one
        else [group[0] for group in groups.values()]
    )
    rows = found.advice if verbose else shown or found.advice[:1]
    if not rows:
        return
    columns = render.columns(
        rows,
        ("<setting", "result.request"),
        ("<least pruning", "result.pruning"),
        ("realised", "result.realised_sparsity", render.percent),
        ("<target", lambda a: "reached" if a.reached else "missed"),
        ("speedup", "result", render.interval),
        ("probability", "probability", probability_text),
        ("time", "result.pruned_s", render.seconds),
        (
            "<runs in stock",
            lambda a: {True: a.result.engine, False: "no", None: "not known"}[a.runs],
        ),
        ("<bottleneck", "result.bottleneck"),
    )
    render.show(render.narrowed(columns[1:] if one else columns, 5))
    for line in of_budgets(rows) if one else ():
        render.say(line, "  ")


def _configurations(folder: str, model: str, found: Advised) -> list[str]:
    """Write the configurations of the families that reach the target in the one setting; return
    notes on the files."""
    from simulator.models.write import write_config
    from simulator.prediction.advise_sentences import settings_of
    from simulator.prediction.runnable import config_of
    from simulator.pruning import FAMILIES

    if (many := len(settings_of(found.advice)) + len(found.dense)) > 1:
        raise InputError(f"--write: expected one device, engine and request, got {many}")
    written, notes = [], []
    for advice in (a for a in found.advice if a.reached):
        r = advice.result
        if any(FAMILIES[name].loading != "config" for name in r.family.split("+")):
            continue
        if advice.runs is False:
            notes.append(f"{r.family}: not written: stock {r.engine} does not run it")
            continue
        try:
            content = config_of(model, r)
        except InputError as error:
            notes.append(f"{r.family}: not written: {error}")
            continue
        write_config(Path(folder) / r.family, content)
        written.append(r.family)
    first = (
        f"written: {folder}/{{{','.join(written)}}}/config.json"
        if written
        else f"{folder}: nothing is written"
    )
    return [first, *notes]


@options.expanded("csv", "ideal")
def search(
    model: options.Model,
    devices: options.Devices = options.DEVICES,
    wanted: Wanted = Wanted(),
    scored: Scored = Scored(),
    write: str | None = option("FOLDER", "Write the plan: plan.yaml for --prune, and config.json."),
    run: options.Run = options.RUN,
    out: options.Output = options.OUTPUT,
) -> None:
    """Choose a variant of each layer that meets targets.

    The plan loses the least quality that meets them. Scores of single replacements are added over
    the layers; the chosen model is predicted whole, and the costs are corrected until the model
    itself meets the targets (with --confidence, the end of its interval). Targets hold on every
    device, engine and request, several at once. Begins with the plan's speed, score and parameters,
    then the layers and the frontier of score against time.

    Scores as CSV. These rows are removals of layers; columns attention and mlp name other variants.
    Layers that are not listed stay dense.

    \b
    layer,score
    20,0.013
    21,0.010
    """
    out.check()
    if write is not None and Path(write).expanduser().is_file():
        raise InputError(f"--write {write}: is a file; expected a folder")
    if not (given := wanted.parsed()):
        others = "--latency, --tokens-per-s, --ttft, --tpot, --memory or --params"
        raise InputError(f"--target: expected a target, such as --target 1.3x, or {others}")
    from simulator.plans.search import search as chosen
    from simulator.plans.solve import Targets

    asked, targets = run.asked(model, devices), Targets(**given, confidence=wanted.confidence)
    if scored.scores is None:
        raise InputError("--scores: expected the scores of each layer, such as a CSV layer,score")
    plan = chosen(model, devices.profiles, targets, **asdict(scored), **asked.settings)
    lines = list(asked.notes)
    if write:
        from simulator.plans.write import write_plan

        lines += write_plan(plan, model, write)
    if out.figure:
        from simulator.figures.plan import plan_figure

        out.draw(lambda: plan_figure(plan))
    if not out.write([plan.to_dict()]):
        return
    from simulator.prediction.notes import uncalibrated

    render.conclude(_conclusion(plan))
    _layers(plan)
    if len(plan.targets) > 1 or out.verbose:
        _targets(plan)
    _frontier(plan, out.verbose)
    render.notes((*lines, *plan.notes, *uncalibrated(plan.results)), out.verbose)


def _conclusion(plan: Plan) -> str:
    from simulator.prediction.wording import if_fitted, interval_text

    first, dense = plan.results[0], plan.results[0].model
    kept = plan.pruned.parameters / max(1, plan.dense_parameters)
    changed = sum((row.attention, row.mlp) != ("dense", "dense") for row in plan.layers)
    interval = interval_text(first.speedup, first.lower, first.upper)
    speed = f"{interval} faster than {dense}{if_fitted(first)}"
    return (
        f"The plan changes {changed} of {len(plan.layers)} layers: {speed} on {first.request},"
        f" {plan.metric} {plan.score:.4g}, {render.percent(kept)} of the parameters."
    )


def _layers(plan: Plan) -> None:
    from itertools import groupby

    from simulator.display import runs

    columns = render.columns(
        [list(some) for _, some in groupby(plan.layers, key=lambda row: (row.attention, row.mlp))],
        ("<layers", lambda rows: runs(row.layer for row in rows)),
        ("<attention", lambda rows: rows[0].attention),
        ("<MLP", lambda rows: rows[0].mlp),
        (plan.metric, lambda rows: f"{sum(row.score for row in rows):.4g}"),
    )
    off = f"; the whole model's time differs from that sum by {render.percent(abs(plan.sum_error))}"
    proof = "the best" if plan.gap == 0.0 else f"within {render.percent(plan.gap)} of the best"
    render.show(
        columns, f"plan: {proof} by the sum of its layers' costs{off if plan.steps else ''}"
    )


def _targets(plan: Plan) -> None:
    from simulator.plans.solve import NAMES, target_text
    from simulator.prediction.wording import probability_text

    columns = render.columns(
        plan.targets,
        ("<hardware", "hardware"),
        ("<engine", "engine"),
        ("<request", lambda t: f"{t.phase} {t.batch} x {t.seq}"),
        ("<target", lambda t: NAMES[t.target]),
        ("wanted", lambda t: target_text(t.target, t.wanted)),
        ("reached", lambda t: target_text(t.target, t.reached)),
        ("probability", "probability", probability_text),
    )
    print()
    render.show(columns, "targets")


def _frontier(plan: Plan, verbose: bool) -> None:
    points = list(plan.frontier)
    if len(points) > MOST_POINTS and not verbose:
        step = (len(points) - 1) / (MOST_POINTS - 1)
        keep = {round(i * step) for i in range(MOST_POINTS)} | {
            i for i, p in enumerate(points) if p.chosen
        }
        points = [points[i] for i in sorted(keep)]
    columns = render.columns(
        points,
        (plan.metric, lambda p: f"{p.score:.4g}"),
        ("speedup", render.interval),
        ("time", "pruned_s", render.seconds),
        ("parameters", "parameters", parameters),
        ("<", lambda p: "chosen" if p.chosen else ""),
    )
    hidden = len(plan.frontier) - len(points)
    print()
    render.show(
        columns,
        f"frontier of score against time{f'; {hidden} more rows with --verbose' if hidden else ''}",
    )


@options.expanded("figure", "ideal", "dense_s", "dense_tokens_per_s", "dense_from")
def costs(
    model: options.Model,
    devices: options.Devices = options.DEVICES,
    choices: str | None = option(
        "FILE", "Variants: a file as --scores of search. Default: the usual ones."
    ),
    run: options.Run = options.RUN,
    out: options.Output = options.OUTPUT,
) -> None:
    """Price every variant of every layer, for a search.

    A variant is attention with fewer KV heads or query heads, an MLP of another width, fewer
    experts, a linear product, or none. Its cost is the difference of a pass with it and a pass
    without that attention or MLP, in the engine, with host time that is not hidden, and with its
    interval. Layers with equal shapes cost the same and share a row. --csv writes a row per layer.
    """
    from simulator.plans.costs import costs as priced

    out.check()
    asked = run.asked(model, devices)
    found = priced(model, devices.profiles, choices, **asked.settings)
    if not out.write(found.rows):
        return
    groups = _together(found)
    render.conclude(_shares(found))
    rows = groups if out.verbose else groups[:MOST_ROWS]
    several = len(found.settings) > 1
    place = [
        ("<hardware", "hardware"),
        ("<engine", "engine"),
        ("<request", lambda row: f"{row['phase']} {row['batch']} x {row['seq']}"),
    ]
    columns = render.columns(
        rows,
        *(place if several else ()),
        ("<layers", "layers"),
        ("<part", "sublayer"),
        ("<variant", "variant"),
        (
            "time of a layer",
            lambda row: render.seconds_between(
                row["seconds"], row["lower"], row["upper"], short=True
            ),
        ),
        ("of dense", "share", render.percent),
        ("parameters", lambda row: f"{row['parameters']:,.0f}"),
        ("cache", "cache_bytes", render.size),
    )
    hidden = (
        f"; {len(groups) - len(rows)} more rows with --verbose" if len(groups) > len(rows) else ""
    )
    title = (
        f"{found.model.name}{'' if several else f' on {found.settings[0]}'}: costs with"
        f" {found.level:.0%} intervals"
    )
    render.show(render.narrowed(columns, 5 + 3 * several), title + hidden)
    render.notes(asked.notes, out.verbose)


def _together(found: Costs) -> list[dict[str, Any]]:
    """Return the costs with equal layers in one row, and each as a share of its dense sublayer,
    which comes first."""
    from simulator.display import runs

    layers, rows, dense = (
        dict[tuple[object, ...], list[int]](),
        dict[tuple[object, ...], dict[str, Any]](),
        0.0,
    )
    for row in found.rows:
        dense = row["seconds"] if row["variant"] == "dense" else dense
        values = tuple(value for name, value in row.items() if name != "layer")
        layers.setdefault(values, []).append(row["layer"])
        rows.setdefault(values, row | {"share": row["seconds"] / dense if dense else 0.0})
    together = [
        row | {"layers": runs(layers[key]) if row["layer"] >= 0 else "-"}
        for key, row in rows.items()
    ]
    return [row for row in together if row["variant"] != "none"]  # a removed part costs nothing


def _shares(found: Costs) -> str:
    first = [
        row for row in found.rows[: len(found) // len(found.settings)] if row["variant"] == "dense"
    ]
    whole = sum(row["seconds"] for row in first)
    names = ("attention", "mlp", "outside")
    parts = [
        sum(row["seconds"] for row in first if row["sublayer"] == name) / whole for name in names
    ]
    attention, mlp, rest = map(render.percent, parts)
    text = f"attention takes {attention}, MLPs {mlp} and what is outside the layers {rest}"
    return f"{found.model.name} takes {render.seconds(whole)} on {found.settings[0]}: {text}."
