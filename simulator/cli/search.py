"""``prunesim search``: choose a variant of each layer under targets."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from simulator.cli import options, parsing, render
from simulator.cli.options import opt
from simulator.errors import InputError
from simulator.units import parameters, parse_parameters, parse_quantity

if TYPE_CHECKING:
    from simulator.plans.search import Plan, PlanPoint

MOST_POINTS = 8  # plans of the frontier in the table without --verbose


# fmt: off
@options.expanded()
def command(
    model: options.Model,
    hardware: options.Hardware,
    scores: Annotated[str | None, opt(
        "--scores", "FILE", "Scores per layer and variant: CSV, Puzzle's block_library.json, a folder of Puzzletron's "
        "validations, or smollm2-135m, which ships. Default: whole layers, with published losses of a model.")] = None,
    metric: Annotated[str, opt("--metric", "NAME", "Column of the scores, if several could be scores.")] = "",
    maximise: Annotated[bool, opt("--maximise", None, "A higher value of the metric is better.")] = False,
    target: Annotated[str | None, opt("--target", "X", "Least speedup, above 1, such as 1.5 or 1.5x.")] = None,
    latency: Annotated[str | None, opt("--latency", "TIME", "Longest time of a pass, such as 12ms.")] = None,
    tokens_per_s: Annotated[float | None, opt(
        "--tokens-per-s", "X", "Fewest new tokens/s over all sequences.")] = None,
    ttft: Annotated[str | None, opt("--ttft", "TIME", "Longest time to first token, such as 500ms.")] = None,
    tpot: Annotated[str | None, opt("--tpot", "TIME", "Longest time per further token, such as 30ms.")] = None,
    memory: Annotated[str | None, opt("--memory", "SIZE", "Most memory on the fullest device, such as 40GiB.")] = None,
    params: Annotated[str | None, opt("--params", "N", "Most parameters, such as 49B.")] = None,
    confidence: Annotated[float, opt("--confidence", "P", "Least probability of reaching each target on time.")] = 0.5,
    uniform: Annotated[bool, opt(
        "--uniform", None, "One shape for all remaining layers, which stock engines load.")] = False,
    groups: Annotated[str | None, opt(
        "--groups", "N", "Layers that share a variant: a number of consecutive ones, or 0-3,4-7.")] = None,
    write: Annotated[str | None, opt(
        "--write", "FOLDER", "Write the plan: plan.yaml for --prune, and config.json.")] = None,
    run: options.Run = options.RUN,
    known: options.Known = options.KNOWN,
    json: options.Json = False,
    figure: options.Figure = None,
    verbose: options.Verbose = False,
) -> None:
    # fmt: on
    """Choose a variant of each layer that meets targets.

    The plan loses the least quality that meets them. Scores of single replacements are added over the layers; the
    chosen model is predicted whole, and the costs are corrected until the model itself meets the targets (with
    --confidence, the end of its interval). Targets hold on every device, engine and request, several at once. Begins
    with the plan's speed, score and parameters, then the layers, what the same budget in parameters or FLOPs would have
    chosen, and the frontier of score against time.
    """
    output = render.Output(json, None, [figure])
    if write is not None and Path(write).expanduser().is_file():
        raise InputError(f"--write {write}: is a file; expected a folder")
    from simulator.plans.search import search
    from simulator.plans.solve import Targets

    requested = run.requests(known, model=model)
    times = {"latency": latency, "ttft": ttft, "tpot": tpot}
    targets = Targets(
        speedup=None if target is None else parsing.speedup_target("--target", target),
        **{f"{k}_s": None if text is None else parsing.duration(f"--{k}", text) for k, text in times.items()},
        tokens_per_s=tokens_per_s,
        memory_bytes=None if memory is None else parsing.checked("--memory", memory, lambda t: parse_quantity(t, "B")),
        parameters=None if params is None else parsing.checked("--params", params, parse_parameters),
        confidence=confidence,
    )
    axes = {name: getattr(requested, name) for name in ("engine", "phase", "batch", "seq", "scenario")}
    how: dict[str, Any] = {"metric": metric, "maximise": maximise, "uniform": uniform, "groups": groups}
    with render.progress("searching") as report:
        plan = search(model, parsing.names("--hardware", hardware), targets, scores, **axes, **how, progress=report)
    lines = list(requested.notes)
    if write:
        from simulator.plans.write import write_plan

        lines += write_plan(plan, model, write)
    if figure:
        from simulator.cli.drawing import draw_plan

        draw_plan(plan, figure)
    if not output.write([plan.to_dict()]):
        return
    from simulator.prediction.sentences import uncalibrated

    render.conclude(*_conclusion(plan))
    _layers(plan)
    if len(plan.targets) > 1 or verbose:
        _targets(plan)
    _others(plan)
    _frontier(plan, verbose)
    render.notes((*lines, *plan.notes, *uncalibrated(plan.results)), verbose)


def _conclusion(plan: Plan) -> list[str]:
    """Return the conclusion: the plan, then what a plan by parameters loses."""
    from simulator.prediction.sentences import speedup_text

    first, dense = plan.results[0], plan.results[0].model
    kept = plan.pruned.parameters / max(1, plan.dense_parameters)
    changed = sum((row.attention, row.mlp) != ("dense", "dense") for row in plan.layers)
    speed = f"{speedup_text(first)} faster than {dense}"
    text = f"The plan changes {changed} of {len(plan.layers)} layers: {speed} on {first.request}, {plan.metric} "
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
    """Print the plan, equal neighbouring layers in one row."""
    from itertools import groupby

    from simulator.models.difference import runs

    columns = render.columns(
        [list(some) for _, some in groupby(plan.layers, key=lambda row: (row.attention, row.mlp))],
        ("<layers", lambda rows: runs(row.layer for row in rows)),
        ("<attention", lambda rows: rows[0].attention),
        ("<MLP", lambda rows: rows[0].mlp),
        (plan.metric, lambda rows: f"{sum(row.score for row in rows):.4g}"),
    )
    off = f"; the whole model's time differs from that sum by {render.percent(abs(plan.sum_error))}"
    proof = "the best" if plan.gap == 0.0 else f"within {render.percent(plan.gap)} of the best"
    render.show(columns, f"plan: {proof} by the sum of its layers' costs{off if plan.steps else ''}")


def _targets(plan: Plan) -> None:
    from simulator.plans.solve import NAMES, target_text
    from simulator.prediction.sentences import probability_text

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
    """Print the plan next to those of other rules."""
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
    """Print the frontier, thinned without --verbose."""
    points = list(plan.frontier)
    if len(points) > MOST_POINTS and not verbose:
        step = (len(points) - 1) / (MOST_POINTS - 1)
        keep = {round(i * step) for i in range(MOST_POINTS)} | {i for i, p in enumerate(points) if p.chosen}
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
    render.show(columns, f"frontier of score against time{f'; {hidden} more rows with --verbose' if hidden else ''}")
