"""Predict what the page and the report show of one request: the answer, figures, a table, notes and
commands; write the report, one HTML file without scripts, which loads nothing."""

from __future__ import annotations

import shlex
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from operator import attrgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from simulator._version import __version__
from simulator.display import one_percentage
from simulator.errors import InputError
from simulator.figures import layout
from simulator.figures.gemms import rooflines_of
from simulator.figures.load import loads_of
from simulator.figures.speedup import speedups_of
from simulator.figures.style import PaperSize, device_title, engine_title, label, svg_text
from simulator.figures.waterfall import waterfalls_of
from simulator.models.library import model_title
from simulator.prediction.draft import draft
from simulator.prediction.energy_sentences import energy_notes, energy_table, of_energy
from simulator.prediction.explain import Explanation, explanation
from simulator.prediction.explain_sentences import conclusions
from simulator.prediction.load import LoadService
from simulator.prediction.load_sentences import COLUMNS as LOAD_COLUMNS
from simulator.prediction.load_sentences import ENERGY, load_columns, of_loads
from simulator.prediction.notes import uncalibrated
from simulator.prediction.requests import batch_name, by_key, profiles
from simulator.prediction.result import Result, Results
from simulator.prediction.runnable import runnables
from simulator.prediction.service import serve
from simulator.prediction.speedup_sentences import answer_of, records
from simulator.prediction.table import table
from simulator.prediction.tariff import Tariff
from simulator.prediction.wording import parts_line
from simulator.units import percent, ratio

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from simulator.hardware.profile import HardwareProfile

WHOLE_WIDTH = PaperSize(7.0)  # whole width of the main figure, inches before the page enlarges it
MOST_DETAILS = 4  # devices and engines on which one pruning is explained

# columns of the table by attribute of a result, and units of some
COLUMNS = {
    "pruning": "pruning",
    "speedup": "speedup",
    "lower": "speedup_lower",
    "upper": "speedup_upper",
    "dense (ms)": "dense_s",
    "pruned (ms)": "pruned_s",
    "FLOP bound": "flop_bound",
    "byte bound": "byte_bound",
    "roofline bound": "roofline_bound",
    "bottleneck": "bottleneck",
    "memory (GiB)": "pruned_memory_bytes",
    "most sequences": "pruned_largest_batch",
}
UNITS = {"dense (ms)": 1e-3, "pruned (ms)": 1e-3, "memory (GiB)": 2**30}

# matplotlib's settings belong to the process, and each visitor of the page has a thread
_DRAWING = threading.Lock()


class Drawing(NamedTuple):
    title: str
    svg: str
    width: int


def _drawn(figures: Callable[[], Mapping[str, Figure]]) -> tuple[Drawing, ...]:
    with _DRAWING:
        return tuple(
            Drawing(title, svg_text(figure), round(96 * figure.get_figwidth()))
            for title, figure in figures().items()
        )


@dataclass(frozen=True)
class PageContent:
    answer: tuple[str, ...]
    facts: Mapping[str, str]  # what was asked
    rows: tuple[Result, ...]
    records: tuple[dict[str, Any], ...]  # the rows of prunesim speedup --json
    details: tuple[Explanation, ...]  # explanations of one pruning
    parts: tuple[str, ...]  # what each named pruning removes, and whether each engine runs it
    notes: tuple[str, ...]
    tariff: Tariff | None = None  # None: no energy

    @property
    def detail(self) -> Result:
        return self.details[0].result

    @property
    def losses(self) -> tuple[str, ...]:
        """Where the explained pruning loses its nominal speedup."""
        return tuple(conclusions(self.details))

    @cached_property
    def drawings(self) -> tuple[Drawing, ...]:
        """The figures; drawing them takes longer than everything else."""
        several = len({(r.phase, r.batch, r.seq) for r in self.rows}) > 1
        r = self.detail
        where = f" ({layout.setting_label(r, seq=True)})" if several else ""
        name = f"{label(r.pruning)}{where}"
        return _drawn(
            lambda: {
                "Speedup": self._speedups(),
                f"Losses of {name}": waterfalls_of(self.details),
                f"GEMMs of {name}": rooflines_of(self.details),
            }
        )

    def _speedups(self) -> Figure:
        with WHOLE_WIDTH.applied():
            return speedups_of([replace(r, family=r.name) for r in self.rows])

    @property
    def prunings(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(r.pruning for r in self.rows))

    @property
    def table(self) -> dict[str, list[Any]]:
        """Columns of the table: settings in which rows differ, then predictions. Times are in ms,
        memory in GiB."""
        columns = differing(self.rows, "hardware", "engine", "phase", "batch", "seq")
        many = "concurrency" if {r.phase for r in self.rows} == {"serve"} else "batch"
        columns = {many if n == "batch" else n: values for n, values in columns.items()}
        columns |= layout.columns(self.rows, **COLUMNS)
        for name, unit in UNITS.items():
            columns[name] = [value / unit for value in columns[name]]
        return columns | (energy_table(self.rows, self.tariff) if self.tariff else {})


def differing(rows: Sequence[Any], *names: str) -> dict[str, list[Any]]:
    """Return the columns in which rows differ."""
    columns = layout.columns(rows, **dict(zip(names, names)))
    return {name: values for name, values in columns.items() if len({*values}) > 1}


@dataclass(frozen=True)
class LoadContent:
    """Models that serve requests which arrive at a rate, as ``prunesim serve --rate`` prints
    them."""

    answer: tuple[str, ...]
    facts: Mapping[str, str]
    loads: tuple[LoadService, ...]
    records: tuple[dict[str, Any], ...]
    table: Mapping[str, list[Any]]
    parts: tuple[str, ...]
    notes: tuple[str, ...]
    losses: tuple[str, ...] = ()

    @cached_property
    def drawings(self) -> tuple[Drawing, ...]:
        return _drawn(lambda: {"99th percentiles over the rate": loads_of(self.loads)})


def content(asked: Mapping[str, Any], detail: str = "") -> PageContent | LoadContent:
    """Predict a request, the arguments of :func:`simulator.table`, and explain the pruning called
    ``detail``, or the one that stays farthest below its roofline bound. With a
    ``rate`` or limits the arguments are those of :func:`simulator.serve`."""
    if asked.keys() & {"rate", "ttft_s", "tpot_s"}:
        return _load_content(**asked)
    return _page_content(dict(asked), detail)


def _load_content(
    models: Any, hardware: Any, phase: Any, batch: Any, rate: float = 0.0, **others: Any
) -> LoadContent:
    for name, stated in (
        ("a rate", rate > 0.0),
        ("phase serve", phase in ("serve", ["serve"])),
        ("no concurrency", batch in (1, [1])),
    ):
        if not stated:
            raise InputError(f"requests that arrive at a rate: expected {name}")
    served = serve(models, hardware, rate=rate, **others)
    groups = by_key(served.loads, lambda load: load.setting).values()
    points = [point for load in served.loads for point in load.points]
    shown = [point for point in points if not point.refused]
    runs = [(p, run) for load in served.loads for p, run in zip(load.points[1:], load.runs)]
    return LoadContent(
        answer=tuple(sentence for loads in groups for sentence in of_loads(loads)),
        facts={
            "Model": model_title(points[0].model),
            "Served": "; ".join(dict.fromkeys(load.title for load in served.loads)),
            "Intervals": percent(points[0].level),
        },
        loads=served.loads,
        records=tuple(point.to_dict() for point in points),
        table={
            **differing(shown, "hardware", "engine", "seq"),
            "model": [point.name for point in shown],
            "replicas": [f"{point.replicas} x {point.devices}" for point in shown],
            **load_columns(shown, {**LOAD_COLUMNS, **ENERGY}),
        },
        parts=tuple(
            f"{p.name} in {p.engine}: will it run? {p.refused or run.sentence}" for p, run in runs
        ),
        notes=(*energy_notes(others.get("tariff"), profiles(hardware)), *served.notes),
    )


def _page_content(asked: dict[str, Any], detail: str) -> PageContent:
    tariff, drafts = asked.pop("tariff", None), asked.pop("draft", False)
    found, devices = table(**asked), profiles(asked["hardware"])
    named = any(asked.get(name) for name in ("prune", "pruned", "method"))
    answers = runnables(found, devices if named else ())
    answer = answer_of(found.rows, answers if named else ())
    parts = [f"{r.pruning}: removes {parts_line(r)}." for r in found if named and r.parts]
    if named:
        runs = zip(found, answers)
        parts += [f"{r.pruning} in {r.engine}: will it run? {a.sentence}" for r, a in runs]
    return PageContent(
        answer=(*answer, *(of_energy(found.rows, tariff) if tariff else ())),
        facts=_facts(found.rows),
        rows=found.rows,
        records=tuple(records(found, answers, tariff)),
        details=_explained(found, asked, detail),
        parts=(*(_drafts(found, devices[0]) if drafts else ()), *dict.fromkeys(parts)),
        notes=(
            *energy_notes(tariff, devices),
            *uncalibrated(found, asked.get("dense_s") is not None),
            *found.notes,
        ),
        tariff=tariff,
    )


def _drafts(found: Results, hw: HardwareProfile) -> Iterator[str]:
    """Return from which acceptance each pruned model pays as a draft of the first request."""
    request = found.asked[0]
    settings = {
        name: value for name, value in request.given.items() if name not in ("phase", "dense_s")
    }
    for pruning in found.prunings:
        try:
            if pruning.model or pruning.described:
                continue
            rows = draft(request.model, pruning.prune, hw, acceptance=0.8, **settings)
        except InputError as error:
            yield f"As a draft: {error}."
            continue
        when, some = "never", [row for row in rows if row.pays_from]
        if some:
            row = min(some, key=attrgetter("pays_from"))
            ends = f"{row.pays_from_lower or 0.0:.2f}-{row.pays_from_upper or 1.0:.2f}"
            when = f"from an acceptance of {row.pays_from:.2f} ({ends})"
        yield f"{rows.draft} pays as a draft {when}: batch {request.batch}, seq {request.seq}."


def _explained(found: Results, asked: Mapping[str, Any], detail: str) -> tuple[Explanation, ...]:
    """Return the explanations of one pruning on each device and engine, for the request in which
    it stays farthest below its roofline bound."""
    rows = [r for r in found if r.pruning == detail] or found.rows
    worst = min(rows, key=lambda r: r.speedup / r.roofline_bound)
    devices = {hw.label: hw for hw in profiles(asked["hardware"])}
    same = attrgetter("pruning", "phase", "batch", "seq")
    explained = [
        explanation(request, found.prunings[index], devices[r.hardware])
        for r, request, index in zip(found, found.asked, found.pruning.tolist())
        if same(r) == same(worst)
    ]
    return tuple(explained[:MOST_DETAILS])


def _facts(rows: Sequence[Result]) -> dict[str, str]:
    r = rows[0]
    listed = {
        "Model": [model_title(r.model) for r in rows],
        "Hardware": [
            f"{f'{r.devices} x ' if r.devices > 1 else ''}{device_title(r.hardware)}" for r in rows
        ],
        "Engine": [engine_title(r.engine) for r in rows],
        "Phase": [r.phase for r in rows],
        batch_name(r.phase).capitalize(): [f"{r.batch:,}" for r in rows],
        "Sequence": [f"{r.seq:,} tokens" for r in rows],
        "New tokens": [f"{r.new_tokens:,}" for r in rows if r.new_tokens],
        "Formats": [f"{r.dtype}, weights {r.weight_dtype}, cache {r.kv_dtype}"],
        "Intervals": [percent(r.level)],
    }
    return {name: ", ".join(dict.fromkeys(values)) for name, values in listed.items() if values}


def cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:,.0f}" if value >= 1000 else ratio(value)
    return f"{value:,}" if isinstance(value, int) else str(value)


def command(name: str, model: str, options: Mapping[str, Any]) -> str:
    words = ["prunesim", name, model]
    for option, value in options.items():
        flag = f"--{option.replace('_', '-')}"
        for one in value if isinstance(value, list | tuple) else [value]:
            if one not in (None, False, ""):
                words += [flag] if one is True else [flag, str(one)]
    return shlex.join(words)


def commands(model: str, options: Mapping[str, Any], found: PageContent | LoadContent) -> list[str]:
    if isinstance(found, LoadContent):
        return [command("serve", model, {**options, "phase": None, "batch": None})]
    r = found.detail
    request = {"phase": r.phase, "batch": r.batch, "seq": r.seq, "concurrency": None}
    alone = dict.fromkeys(("family", "method", "sparsity", "option"))
    explained = {**options, **alone, **request, **({"prune": [r.prune]} if r.prune else {})}
    return [command("speedup", model, options), command("explain", model, explained)]


MOST_BYTES = 1_000_000  # size of a report; figures that exceed it are omitted with a note
MOST_ROWS = 500  # rows of the table


def report_html(found: PageContent | LoadContent, commands: Sequence[str]) -> str:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    notes, drawings = one_percentage(found.notes), list[Drawing]()
    if (more := len(found.records) - MOST_ROWS) > 0:
        notes.append(
            f"table: the first {MOST_ROWS} rows; prunesim speedup --csv FILE writes {more:,} more"
        )
    columns = {name: values[:MOST_ROWS] for name, values in found.table.items()}
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
    )
    rendered = partial(
        environment.get_template("report.html").render,
        found=found,
        commands=commands,
        notes=notes,
        columns=columns,
        rows=list(zip(*columns.values())),
        cell=cell,
        version=__version__,
    )
    for drawing in found.drawings:
        if len(rendered(drawings=[*drawings, drawing]).encode()) < MOST_BYTES:
            drawings.append(drawing)
        else:
            notes.append(
                f"figure {drawing.title}: omitted, too large; request fewer predictions, or use"
                " --figure FILE"
            )
    return str(rendered(drawings=drawings))
