"""``prunesim serve``: compare dense and pruned models in a server."""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any

import typer

from simulator.cli import options, parsing, render
from simulator.cli.options import opt, option
from simulator.errors import InputError
from simulator.request import SETTINGS
from simulator.units import parse_count, parse_quantity

if TYPE_CHECKING:
    from simulator.prediction.load import LoadPoint, LoadService
    from simulator.prediction.service import OperatingPoint, Service

# services with sentences and a table each; of more, one row each is printed without --verbose
MOST_SERVICES = 3
# prunings in a table without --verbose: those with the most tokens/s at equal memory
MOST_PRUNINGS = 6


Ttft = Annotated[
    str | None, opt("--ttft", "TIME", "Limit of the time to the first token, such as 500ms.")
]
Tpot = Annotated[
    str | None, opt("--tpot", "TIME", "Limit of the time per output token, such as 30ms.")
]
Rate = Annotated[
    float | None,
    opt("--rate", "X", "Requests per second that arrive: simulates the engine's schedule."),
]


@dataclass(frozen=True)
class Server:
    concurrency: str | None = option(
        "LIST",
        "Requests in flight of the comparison at equal concurrency, such as 1,16,64. "
        "Default: the most that fit the dense model.",
    )
    ttft: Ttft = None
    tpot: Tpot = None
    confidence: float = option("P", "Probability with which the limits must hold.", 0.5)
    price: float | None = option("X", "Price of a GPU-hour, for the cost of a million tokens.")


@dataclass(frozen=True)
class Arrivals:
    rate: Rate = None
    requests: str | None = option(
        "N", "Requests: 1,000 with --rate; alone all at once; with --concurrency as clients send."
    )
    trace: str | None = option("FILE", "CSV of requests: arrival (s), prompt, output (tokens).")
    length_sd: float = option(
        "X", "Deviation of the logs of prompt and output lengths; 0: fixed.", 0.0
    )
    goodput: float = option("P", "Share of the requests that must keep the limits.", 0.99)
    replicas: int | None = option("N", "Replicas. Default: as many as the limits need at the rate.")
    seed: int = option("N", "Seed of arrivals and lengths.", 0)
    timeline: str | None = option(
        "FILE", "Also draw each request of a short run: .pdf, .svg or .png."
    )


# a server has its own concurrency, and can have several numbers of devices
LOAD: options.Run = options.run_options(
    *(name for name in SETTINGS if name not in ("phase", "batch", "dense_s", "devices"))
)


@options.expanded()
def command(
    context: typer.Context,
    model: options.Model,
    devices: options.Devices = options.DEVICES,
    prunings: options.Prunings = options.PRUNINGS,
    tp: str = options.setting_option(
        "devices", "LIST", "Numbers of devices that share the model, such as 1,2,4,8.", "1"
    ),
    server: Server = Server(),
    arrivals: Arrivals = Arrivals(),
    run: options.Run = LOAD,
    metered: options.Metered = options.METERED,
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

    With --rate, --requests or --trace it simulates the engine's schedule: percentiles of the times
    of requests; with --ttft or --tpot also the largest rate that keeps these limits, and the GPUs
    that --rate needs. Other options are those of the engine's server, such as --max-num-seqs 64.
    """
    out.check(arrivals.timeline)
    from simulator.prediction.energy_sentences import energy_notes
    from simulator.prediction.service import serve

    asked = run.asked(model, devices, prunings)
    _check_spelling(context)
    if arrivals.timeline and not (arrivals.rate or arrivals.requests or arrivals.trace):
        raise InputError("--timeline: expected with --rate, --requests or --trace")
    found = serve(
        model,
        devices.profiles,
        concurrency=(
            parsing.integers("--concurrency", server.concurrency) if server.concurrency else None
        ),
        **limits(server.ttft, server.tpot),
        probability=server.confidence,
        price=server.price,
        tariff=metered.tariff,
        rate=arrivals.rate,
        requests=(
            None
            if arrivals.requests is None
            else parsing.checked("--requests", arrivals.requests, parse_count)
        ),
        trace=arrivals.trace,
        length_sd=arrivals.length_sd,
        goodput=arrivals.goodput,
        replicas=arrivals.replicas,
        seed=arrivals.seed,
        server=context.args,
        devices=parsing.integers("--tp", tp),
        **prunings.parsed(),
        **asked.settings,
    )
    curves = [point for service in found.services for point in service.curve] if out.verbose else []
    if out.write([point.to_dict() for point in (*found.points, *curves)]):
        if found.loads:
            _print_loads(found.loads, out.verbose)
        else:
            _print(found.services, out.verbose)
    if out.figure:
        if found.loads:
            from simulator.figures.load import loads_of

            out.draw(lambda: loads_of(found.loads))
        else:
            from simulator.figures.speedup import services_of

            out.draw(lambda: services_of(found.services))
    if arrivals.timeline:
        from simulator.figures.load import timeline_of

        out.draw(lambda: timeline_of(found.loads[0]), arrivals.timeline)
    of_energy = energy_notes(metered.tariff, devices.profiles)
    render.notes((*asked.notes, *of_energy, *found.notes), out.verbose)


def limits(ttft: str | None, tpot: str | None) -> dict[str, Any]:
    """Return the limits of times, s, as arguments of :func:`simulator.serve`."""
    seconds = partial(parse_quantity, unit="s")
    return {
        f"{name}_s": parsing.checked(f"--{name}", text, seconds)
        for name, text in (("ttft", ttft), ("tpot", tpot))
        if text is not None
    }


def _check_spelling(context: typer.Context) -> None:
    """Refuse a further option that is nearly one of the command, as it is none of a server."""
    known = [name for param in context.command.params for name in param.opts]
    for word in context.args:
        name = word.partition("=")[0]
        near = difflib.get_close_matches(name, known, n=1, cutoff=0.8)
        if name.startswith("--") and near:
            raise InputError(f"option {name!r} is unknown; did you mean {near[0]}?")


def _print_loads(loads: Sequence[LoadService], verbose: bool) -> None:
    """Print the conclusion and a table for services that differ only in the devices that share a
    model; with ``verbose`` also all numbers."""
    from simulator.prediction.load import NUMBERS
    from simulator.prediction.load_sentences import ENERGY, load_columns, of_loads
    from simulator.prediction.requests import by_key

    for group in render.between(by_key(loads, lambda load: load.setting).values()):
        render.conclude(*of_loads(group))
        points = [point for load in group for point in load.points]
        shown = [point for point in points if not point.refused]
        columns = [render.Column(*column) for column in load_columns(shown).items()]
        render.show(render.narrowed([*_names(shown), *columns], 4), group[0].title)
        energy = [render.Column(*column) for column in load_columns(shown, ENERGY).items()]
        render.show_in_parts(_names(shown), energy, "energy per output token")
        print(f"\nintervals of {render.percent(points[0].level)}")
        for point in points:
            if point.refused:
                several = f" on {point.devices} devices" if point.devices > 1 else ""
                render.say(f"{point.name}{several} does not run: {point.refused}", "  ")
        numbers = load_columns(shown, {name: name for name in NUMBERS if verbose})
        render.show_in_parts(_names(shown), [render.Column(*one) for one in numbers.items()])


def _names(points: Sequence[LoadPoint]) -> list[render.Column]:
    return render.columns(
        points,
        ("<model", "name"),
        ("replicas", lambda point: f"{point.replicas} x {point.devices}"),
    )


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
    render.show(render.first_fitting(layouts), title)
    if first.numbers:
        _print_energy([row for row in _rows(service, shown) if not isinstance(row, str)])
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
            render.first_fitting(_layouts(service.curve, True, named=True)),
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
    from simulator.prediction.requests import device_text
    from simulator.prediction.service import LIMITS, MEMORY
    from simulator.prediction.service_sentences import ranked

    limited = LIMITS if LIMITS in services[0].kinds else MEMORY
    rows = [[s.kinds[kind][ranked(s)[0]] for kind in (MEMORY, limited)] for s in services]
    columns = render.columns(
        rows,
        ("<hardware", lambda row: device_text(row[0])),
        ("<engine", lambda row: row[0].engine),
        ("seq", lambda row: f"{row[0].seq:,}"),
        ("<best pruning", lambda row: row[0].name),
        ("in\nflight", lambda row: f"{row[0].concurrency:,}"),
        ("tokens/s per GPU", lambda row: _rate(row[0])),
        ("ratio", lambda row: _ratio(row[0])),
        ("in flight\nwithin limits", lambda row: f"{row[1].concurrency:,}"),
        ("ratio\nwithin limits", lambda row: _ratio(row[1])),
    )
    render.show(
        render.narrowed(columns[: len(columns) if limited == LIMITS else -2], 5), "at equal memory"
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


def _print_energy(points: Sequence[OperatingPoint]) -> None:
    from simulator.prediction.load_sentences import ENERGY, load_columns

    names = render.columns(
        points,
        ("<at", "point"),
        ("<model", "name"),
        ("in\nflight", lambda p: f"{p.concurrency:,}"),
    )
    energy = [render.Column(*column) for column in load_columns(points, ENERGY).items()]
    render.show_in_parts(names, energy, "energy per output token")


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
