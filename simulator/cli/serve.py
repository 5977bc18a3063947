"""``prunesim serve``: compare dense and pruned models in a server."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Annotated

from simulator.cli import options, parsing, render
from simulator.cli.options import opt
from simulator.errors import InputError
from simulator.request import SETTINGS
from simulator.units import parse_quantity

if TYPE_CHECKING:
    from simulator.prediction.service import OperatingPoint, Service

# services with sentences and a table each; of more, one row each is printed without --verbose
MOST_SERVICES = 3
# prunings in a table without --verbose: those with the most tokens/s at equal memory
MOST_PRUNINGS = 6


@dataclass(frozen=True)
class Server:
    concurrency: Annotated[
        str | None,
        opt(
            "--concurrency",
            "LIST",
            "Requests in flight of the comparison at equal concurrency, such as 1,16,64. "
            "Default: the most that fit the dense model.",
        ),
    ] = None
    ttft: Annotated[
        str | None, opt("--ttft", "TIME", "Limit of the time to the first token, such as 500ms.")
    ] = None
    tpot: Annotated[
        str | None, opt("--tpot", "TIME", "Limit of the time per output token, such as 30ms.")
    ] = None
    confidence: Annotated[
        float, opt("--confidence", "P", "Probability with which the limits must hold.")
    ] = 0.5
    price: Annotated[
        float | None, opt("--price", "X", "Price of a GPU-hour, for the cost of a million tokens.")
    ] = None


# a server has its own concurrency
LOAD: options.Run = options.run_options(
    *(name for name in SETTINGS if name not in ("phase", "batch", "dense_s"))
)


@options.expanded()
def command(
    model: options.Model,
    devices: options.Devices = options.DEVICES,
    prunings: options.Prunings = options.PRUNINGS,
    server: Server = Server(),
    run: options.Run = LOAD,
    out: options.Output = options.OUTPUT,
) -> None:
    """Compare dense and pruned models in a server.

    A pruned model leaves memory for more sequences, and keeps limits of latency at a higher load.
    Begins with the answers for the pruning that serves most. The table has the dense and each
    pruned model with equally many requests in flight, each with as many as its weights and caches
    leave memory for (at most the engine's limit), and with --ttft or --tpot each with as many as
    keep these limits. A request takes the steady state of continuous batching. With --price it
    shows the cost of a million tokens: of output that pays for all, and of prompt and output alike
    (--verbose: of prompt and of new tokens, by their share of the device time).
    """
    output = render.Output(out.json, out.csv, [out.figure])
    from simulator.prediction.service import serve

    asked = run.asked(model, devices, prunings)
    if len(asked.settings["seq"]) != 1:
        raise InputError(f"--seq {run.text('seq')!r}: expected one length")
    seconds, texts = partial(parse_quantity, unit="s"), {"ttft": server.ttft, "tpot": server.tpot}
    limits = {
        n: parsing.checked(f"--{n}", text, seconds) for n, text in texts.items() if text is not None
    }
    found = serve(
        model,
        devices.profiles,
        concurrency=(
            parsing.integers("--concurrency", server.concurrency) if server.concurrency else None
        ),
        **{f"{n}_s": limit for n, limit in limits.items()},
        probability=server.confidence,
        price=server.price,
        **prunings.parsed(),
        **asked.settings,
    )
    curves = [point for service in found.services for point in service.curve] if out.verbose else []
    if output.write([point.to_dict() for point in (*found.points, *curves)]):
        _print(found.services, out.verbose)
    if out.figure:
        from simulator.figures.speedup import services_of
        from simulator.figures.style import save_figure

        save_figure(services_of(found.services), out.figure)
    render.notes((*asked.notes, *found.notes), out.verbose)


def _print(services: Sequence[Service], verbose: bool) -> None:
    """Print the conclusion and a table for each service; of many services one row each."""
    from simulator.prediction.service_sentences import best_point, of_service

    if len(services) > MOST_SERVICES and not verbose:
        most = [
            0.0 if math.isnan(ratio) else ratio for ratio in (best_point(s).ratio for s in services)
        ]
        render.conclude(*of_service(services[most.index(max(most))]))
        _print_rows(services)
        return
    for service in render.between(services):
        render.conclude(*of_service(service))
        _print_one(service, verbose)


def _print_one(service: Service, verbose: bool) -> None:
    """Print the operating points of a service, and sentences on the models that are not in the
    conclusion."""
    from simulator.prediction.service import LIMITS, MEMORY
    from simulator.prediction.service_sentences import equal_memory, failing_text, ranked

    order, first = ranked(service), service.points[0]
    shown = [0, *sorted(order if verbose else order[:MOST_PRUNINGS])]
    hidden = len(order) + 1 - len(shown)
    more = f"; {hidden} more prunings with --verbose" if hidden else ""
    layouts = _layouts(_rows(service, shown), verbose)
    title = f"{first.model} on {first.setting}{more}"
    render.show(render.first_fitting(layouts, render.width()), title)
    print(
        f"\nintervals of {render.percent(first.level)}; ratio: tokens/s over those of the dense"
        " model"
    )
    print(
        "time to first token includes the server's time and depends on how requests arrive; its"
        " interval covers both"
    )
    points = service.kinds[MEMORY]
    lines = [equal_memory(points[0], points[i]) for i in shown if i not in (0, order[0])]
    lines += [
        f"{point.name} in {point.engine}: will it run? {answer.sentence}"
        for point, answer in zip(service.points[1:], service.runs)
        if not answer.works
    ]
    for point in service.kinds.get(LIMITS, ()):
        if text := failing_text(service, point):
            lines.append(f"{point.name}: {text}.")
    for line in lines:
        render.say(line, "  ")
    if verbose:
        print()
        render.show(
            render.first_fitting(_layouts(service.curve, True, named=True), render.width()),
            "every concurrency",
        )


def _rows(service: Service, shown: Sequence[int]) -> list[OperatingPoint | str]:
    from simulator.prediction.service import EQUAL, LIMITS

    rows: list[OperatingPoint | str] = []
    for kind, points in service.kinds.items():
        rows.append(kind if kind == LIMITS else f"at {kind}")
        rows += [some[i] for some in (service.equal if kind == EQUAL else [points]) for i in shown]
    return rows


def _print_rows(services: Sequence[Service]) -> None:
    from simulator.prediction.service import LIMITS, MEMORY
    from simulator.prediction.service_sentences import ranked

    limited = LIMITS if LIMITS in services[0].kinds else MEMORY
    rows = [[s.kinds[kind][ranked(s)[0]] for kind in (MEMORY, limited)] for s in services]
    columns = render.columns(
        rows,
        ("<hardware", lambda row: row[0].hardware),
        ("<engine", lambda row: row[0].engine),
        ("<best pruning", lambda row: row[0].name),
        ("in\nflight", lambda row: f"{row[0].concurrency:,}"),
        ("tokens/s per GPU", lambda row: _rate(row[0])),
        ("ratio", lambda row: _ratio(row[0])),
        ("in flight\nwithin limits", lambda row: f"{row[1].concurrency:,}"),
        ("ratio\nwithin limits", lambda row: _ratio(row[1])),
    )
    render.show(
        render.narrowed(columns[: len(columns) if limited == LIMITS else -2], 4), "at equal memory"
    )


def _layouts(
    rows: Sequence[OperatingPoint | str], verbose: bool, named: bool = False
) -> Iterator[list[render.Column]]:
    """Yield layouts from the most detailed to the narrowest; a text is a heading of the rows below
    it."""
    from simulator.prediction.service import OperatingPoint
    from simulator.prediction.service_sentences import money
    from simulator.prediction.wording import probability_text

    points = [row for row in rows if isinstance(row, OperatingPoint)]

    def column(title: str, cell: Callable[[OperatingPoint], str]) -> render.Column:
        return render.Column(
            title, [cell(row) if isinstance(row, OperatingPoint) else "" for row in rows]
        )

    def cost(name: str) -> Callable[[OperatingPoint], str]:
        return lambda p: money(getattr(p, name)) if p.concurrency else "-"

    def chance(p: OperatingPoint) -> str:
        return "-" if math.isnan(p.probability) else probability_text(p.probability)

    def layout(request: bool, detail: int) -> Iterator[render.Column]:
        names = [
            row if isinstance(row, str) else f"{'' if named else '  '}{row.name}" for row in rows
        ]
        yield render.Column("model", names, right=False)
        yield column("in\nflight", lambda p: f"{p.concurrency:,}")
        yield column("tokens/s\nper GPU", _rate)
        if not named:
            yield column("ratio", _ratio)
        if request:
            yield column("time of\na request", lambda p: _time(p, "request", detail))
        yield column("time to\nfirst token", lambda p: _time(p, "ttft", 2 if detail else 0))
        yield column("time per\noutput token", lambda p: _time(p, "tpot", detail))
        if not all(math.isnan(p.probability) for p in points):
            yield column("limits\nhold", chance)
        if not all(math.isnan(p.cost_output) for p in points):
            yield column("cost/M\noutput", cost("cost_output"))
            yield column("cost/M\nall", cost("cost_all"))
            if verbose:
                yield column("cost/M\nprompt", cost("cost_prompt"))
                yield column("cost/M\nnew", cost("cost_new"))

    for request, detail in ((True, 2), (True, 1), (False, 2), (False, 1), (True, 0), (False, 0)):
        yield list(layout(request, detail))


def _rate(p: OperatingPoint) -> str:
    if not p.concurrency:
        return "-"
    return f"{p.tokens_per_s:,.0f} ({p.tokens_per_s_lower:,.0f}-{p.tokens_per_s_upper:,.0f})"


def _ratio(p: OperatingPoint) -> str:
    if math.isnan(p.ratio):
        return "-"
    ends = f" ({render.ratio(p.ratio_lower)}-{render.ratio(p.ratio_upper)})" if p.pruning else ""
    return f"{render.ratio(p.ratio)}{ends}"


def _time(p: OperatingPoint, name: str, detail: int) -> str:
    """Return a time: with its interval (2), with its interval in few characters (1), or alone
    (0)."""
    if not p.concurrency:
        return "-"
    value, lower, upper = (getattr(p, f"{name}_{end}") for end in ("s", "lower", "upper"))
    return (
        render.seconds_between(value, lower, upper, short=detail == 1)
        if detail
        else render.seconds(value)
    )
