"""``prunesim advise``, ``search`` and ``costs``: find the least pruning that reaches a target,
choose a variant of each layer under targets, price every variant."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from simulator.cli import options, parsing, render
from simulator.cli.options import opt
from simulator.errors import InputError
from simulator.units import parameters, parse_parameters, parse_quantity, parse_ratio

if TYPE_CHECKING:
    from simulator.plans.costs import Costs
    from simulator.plans.search import Plan, PlanPoint
    from simulator.prediction.advise import Advised

MOST_FAMILIES = 5  # rows of the table of one setting without --verbose
MOST_POINTS = 8  # plans of the frontier in the table without --verbose
MOST_ROWS = 24  # rows of the table of costs without --verbose


@dataclass(frozen=True)
class Scored:
    scores: Annotated[
        str | None,
        opt(
            "--scores",
            "FILE",
            "Scores per layer and variant: CSV, Puzzle's block_library.json, a folder of"
            " Puzzletron's validations, or smollm2-135m, which ships. Default: whole layers, with"
            " published losses of a model.",
        ),
    ] = None
    metric: Annotated[
        str, opt("--metric", "NAME", "Column of the scores, if several could be scores.")
    ] = ""
    maximise: Annotated[
        bool, opt("--maximise", None, "A higher value of the metric is better.")
    ] = False
    uniform: Annotated[
        bool,
        opt("--uniform", None, "One shape for all remaining layers, which stock engines load."),
    ] = False
    groups: Annotated[
        str | None,
        opt(
            "--groups",
            "N",
            "Layers that share a variant: a number of consecutive ones, or 0-3,4-7.",
        ),
    ] = None


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
    target: Annotated[
        str | None, opt("--target", "X", "Least speedup, above 1, such as 1.5 or 1.5x.")
    ] = None
    latency: Annotated[
        str | None, opt("--latency", "TIME", "Longest time of a pass, such as 12ms.")
    ] = None
    tokens_per_s: Annotated[
        float | None, opt("--tokens-per-s", "X", "Fewest new tokens/s over all sequences.")
    ] = None
    confidence: Annotated[
        float, opt("--confidence", "P", "Least probability of reaching each target on time.")
    ] = 0.5

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
    ttft: Annotated[
        str | None, opt("--ttft", "TIME", "Longest time to first token, such as 500ms.")
    ] = None
    tpot: Annotated[
        str | None, opt("--tpot", "TIME", "Longest time per further token, such as 30ms.")
    ] = None
    memory: Annotated[
        str | None, opt("--memory", "SIZE", "Most memory on the fullest device, such as 40GiB.")
    ] = None
    params: Annotated[str | None, opt("--params", "N", "Most parameters, such as 49B.")] = None


@options.expanded("csv", "figure")
def advise(
    model: options.Model,
    devices: options.Devices = options.DEVICES,
    aim: Aim = Aim(),
    family: Annotated[
        str | None, opt("--family", "LIST", "Pruning families to consider. Default: all.")
    ] = None,
    write: Annotated[
        str | None,
        opt(
            "--write",
            "FOLDER",
            "Write FOLDER/FAMILY/config.json for depth, width and both, where they reach it.",
        ),
    ] = None,
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
    if not render.Output(out.json).write(found.rows()):
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
        ("<setting", lambda a: a.result.request),
        ("<least pruning", lambda a: a.result.pruning),
        ("realised", lambda a: render.percent(a.result.realised_sparsity)),
        ("<target", lambda a: "reached" if a.reached else "missed"),
        ("speedup", lambda a: render.interval(a.result)),
        ("probability", lambda a: probability_text(a.probability)),
        ("time", lambda a: render.seconds(a.result.pruned_s)),
        (
            "<runs in stock",
            lambda a: {True: a.result.engine, False: "no", None: "not known"}[a.runs],
        ),
        ("<bottleneck", lambda a: a.result.bottleneck),
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
    write: Annotated[
        str | None,
        opt("--write", "FOLDER", "Write the plan: plan.yaml for --prune, and config.json."),
    ] = None,
    run: options.Run = options.RUN,
    out: options.Output = options.OUTPUT,
) -> None:
    """Choose a variant of each layer that meets targets.

    The plan loses the least quality that meets them. Scores of single replacements are added over
    the layers; the chosen model is predicted whole, and the costs are corrected until the model
    itself meets the targets (with --confidence, the end of its interval). Targets hold on every
    device, engine and request, several at once. Begins with the plan's speed, score and parameters,
    then the layers, what the same budget in parameters or FLOPs would have chosen, and the frontier
    of score against time.

    Scores as CSV. These rows are removals of layers; columns attention and mlp name other variants.
    Layers that are not listed stay dense.

    \b
    layer,score
    20,0.013
    21,0.010
    """
    output = render.Output(out.json, None, [out.figure], out.width, out.font)
    if write is not None and Path(write).expanduser().is_file():
        raise InputError(f"--write {write}: is a file; expected a folder")
    if not (given := wanted.parsed()):
        others = "--latency, --tokens-per-s, --ttft, --tpot, --memory or --params"
        raise InputError(f"--target: expected a target, such as --target 1.3x, or {others}")
    from simulator.plans.search import search as chosen
    from simulator.plans.solve import Targets

    asked, targets = run.asked(model, devices), Targets(**given, confidence=wanted.confidence)
    plan = chosen(model, devices.profiles, targets, **asdict(scored), **asked.settings)
    lines = list(asked.notes)
    if write:
        from simulator.plans.write import write_plan

        lines += write_plan(plan, model, write)
    if out.figure:
        from simulator.figures.plan import plan_figure

        output.draw(lambda: plan_figure(plan), out.figure)
    if not output.write([plan.to_dict()]):
        return
    from simulator.prediction.notes import uncalibrated

    render.conclude(*_conclusion(plan))
    _layers(plan)
    if len(plan.targets) > 1 or out.verbose:
        _targets(plan)
    _others(plan)
    _frontier(plan, out.verbose)
    render.notes((*lines, *plan.notes, *uncalibrated(plan.results)), out.verbose)


def _conclusion(plan: Plan) -> list[str]:
    from simulator.prediction.wording import if_fitted, interval_text

    first, dense = plan.results[0], plan.results[0].model
    kept = plan.pruned.parameters / max(1, plan.dense_parameters)
    changed = sum((row.attention, row.mlp) != ("dense", "dense") for row in plan.layers)
    interval = interval_text(first.speedup, first.lower, first.upper)
    speed = f"{interval} faster than {dense}{if_fitted(first)}"
    text = (
        f"The plan changes {changed} of {len(plan.layers)} layers: {speed} on {first.request},"
        f" {plan.metric} "
    )
    text += f"{plan.score:.4g}, {render.percent(kept)} of the parameters."
    by, lost = {(a.chosen_by, a.budget): a.point for a in plan.alternatives}, []
    if (same := by.get(("parameters", "same"))) and same.speedup < 0.995 * first.speedup:
        lost.append(f"the best plan with as many parameters reaches {render.ratio(same.speedup)}x")
    if (until := by.get(("parameters", "targets"))) and until.score > 1.005 * plan.score > 0.0:
        worse = render.percent(until.score / plan.score - 1.0)
        lost.append(f"a choice by parameters that meets the targets scores {worse} worse")
    second = "; ".join(lost) or "a choice by parameters gives the same" if until else ""
    return [text, f"{second[:1].upper()}{second[1:]}." if second else ""]


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
        ("<hardware", lambda t: t.hardware),
        ("<engine", lambda t: t.engine),
        ("<request", lambda t: f"{t.phase} {t.batch} x {t.seq}"),
        ("<target", lambda t: NAMES[t.target]),
        ("wanted", lambda t: target_text(t.target, t.wanted)),
        ("reached", lambda t: target_text(t.target, t.reached)),
        ("probability", lambda t: probability_text(t.probability)),
    )
    print()
    render.show(columns, "targets")


def _others(plan: Plan) -> None:
    chosen = next(point for point in plan.frontier if point.chosen)
    rows: list[tuple[str, PlanPoint, bool]] = [("time, this search", chosen, True)]
    rows += [(a.rule, a.point, a.meets) for a in plan.alternatives]
    columns = render.columns(
        rows,
        ("<chosen by", lambda row: row[0]),
        ("speedup", lambda row: render.interval(row[1])),
        (plan.metric, lambda row: f"{row[1].score:.4g}"),
        ("parameters", lambda row: parameters(row[1].parameters)),
        ("<targets", lambda row: "met" if row[2] else "missed"),
    )
    print()
    render.show(columns, "what other rules choose, predicted in the first setting")


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
        ("time", lambda p: render.seconds(p.pruned_s)),
        ("parameters", lambda p: parameters(p.parameters)),
        ("<", lambda p: "chosen" if p.chosen else ""),
    )
    hidden = len(plan.frontier) - len(points)
    print()
    render.show(
        columns,
        f"frontier of score against time{f'; {hidden} more rows with --verbose' if hidden else ''}",
    )


@options.expanded("csv", "figure", "ideal", "dense_s", "dense_tokens_per_s", "dense_from")
def costs(
    model: options.Model,
    devices: options.Devices = options.DEVICES,
    choices: Annotated[
        str | None,
        opt(
            "--choices",
            "FILE",
            "Variants: YAML, or a file as --scores of search. Default: the usual ones.",
        ),
    ] = None,
    output: Annotated[
        str | None,
        opt(
            "-o --output",
            "FILE",
            "Write all costs: .csv, .parquet, or .json as ModelOpt's subblock_stats.json "
            "(with --phase generate).",
        ),
    ] = None,
    run: options.Run = options.RUN,
    out: options.Output = options.OUTPUT,
) -> None:
    """Price every variant of every layer, for a search.

    A variant is attention with fewer KV heads or query heads, an MLP of another width, fewer
    experts, a linear product, or none. Its cost is the difference of a pass with it and a pass
    without that attention or MLP, in the engine, with host time that is not hidden, and with its
    interval. Layers with equal shapes cost the same and share a row. -o writes a row per layer. As
    subblock_stats.json, with --phase generate, it has the prefill and decode times that ModelOpt's
    Puzzletron needs for its latency targets.
    """
    asked = run.asked(model, devices)
    if output is not None:
        _checked(output, asked.settings["phase"])
    from simulator.plans.costs import costs as priced

    found = priced(model, devices.profiles, choices, **asked.settings)
    lines = list(asked.notes)
    if output is not None:
        _write(found, output)
        lines.append(f"written: {output}: {len(found)} costs")
    if not render.Output(out.json).write(found.rows):
        return
    groups = _together(found)
    render.conclude(_shares(found))
    rows = groups if out.verbose else groups[:MOST_ROWS]
    several = len(found.settings) > 1
    place = [
        ("<hardware", lambda row: row["hardware"]),
        ("<engine", lambda row: row["engine"]),
        ("<request", lambda row: f"{row['phase']} {row['batch']} x {row['seq']}"),
    ]
    columns = render.columns(
        rows,
        *(place if several else ()),
        ("<layers", lambda row: row["layers"]),
        ("<part", lambda row: row["sublayer"]),
        ("<variant", lambda row: row["variant"]),
        (
            "time of a layer",
            lambda row: render.seconds_between(
                row["seconds"], row["lower"], row["upper"], short=True
            ),
        ),
        ("of dense", lambda row: render.percent(row["share"])),
        ("parameters", lambda row: f"{row['parameters']:,.0f}"),
        ("cache", lambda row: render.size(row["cache_bytes"])),
    )
    hidden = (
        f"; {len(groups) - len(rows)} more rows with --verbose" if len(groups) > len(rows) else ""
    )
    title = (
        f"{found.model.name}{'' if several else f' on {found.settings[0]}'}: costs with"
        f" {found.level:.0%} intervals"
    )
    render.show(render.narrowed(columns, 5 + 3 * several), title + hidden)
    render.notes(lines, out.verbose)


def _checked(output: str, phases: Sequence[str]) -> None:
    """Reject a target of an unknown format or in a missing folder before any work."""
    from simulator.files.write import check_target

    kind = Path(output).suffix
    if kind not in (".csv", ".json", ".parquet"):
        raise InputError(f"--output {output}: expected a name that ends in .csv, .json or .parquet")
    if kind == ".json" and (alone := {"prefill", "decode"} & set(phases)):
        wanted = "expected --phase generate, because ModelOpt needs prefill and decode times"
        raise InputError(f"--output {output}: {wanted}, got {min(alone)}")
    check_target(output)


def _write(found: Costs, output: str) -> None:
    from simulator.files.write import write_whole

    kind = Path(output).suffix
    if kind == ".parquet":
        from simulator.files.read import load_pyarrow

        pa, pq = load_pyarrow()
        out = io.BytesIO()
        pq.write_table(
            pa.table({name: column.tolist() for name, column in found.columns.items()}), out
        )
        content = out.getvalue()
    elif kind == ".json":
        from simulator.plans.write import stats_text

        content = stats_text(found).encode()
    else:
        from simulator.files.csv import csv_text

        content = csv_text(found.rows).encode()
    write_whole(output, content)


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
