"""Predict and draw the figures of a paper about a model, each with its name and caption."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from matplotlib.figure import Figure

from simulator.codes import ROLES
from simulator.display import with_and
from simulator.engines.engine import load_engine, sparse24_engines
from simulator.errors import InputError, unknown
from simulator.figures.gemms import roof_of, roofline_figure
from simulator.figures.layout import NoRoom, across, device, interval
from simulator.figures.measured import Cloud, MeasuredGemms, agreement, scatter_figure
from simulator.figures.pareto import fronts_of
from simulator.figures.speedup import speedups_of
from simulator.figures.style import device_title, engine_title, label
from simulator.figures.tables import SKIPPED_PAIRS, kept_axes, taxonomy_figure
from simulator.figures.waterfall import steps_of, waterfall_figure
from simulator.hardware.profile import HardwareProfile
from simulator.models.library import load_model, model_title
from simulator.models.lower import lower, number_formats
from simulator.models.model import Model
from simulator.prediction.explain import explanations
from simulator.prediction.pareto import fronts
from simulator.prediction.quality import choose_axis, load_quality
from simulator.prediction.requests import profiles
from simulator.prediction.table import table
from simulator.pruning import FAMILIES, general_families, prune
from simulator.request import Request

SPARSITIES = (0.1, 0.25, 0.5)
# sparsity at which families are compared: all of them support it (2:4 supports no other)
MAP_SPARSITY = 0.5
ROOFLINE_FAMILY = "width"
ROOFLINE_SPARSITY = 0.3
ROOFLINE_CASES = (("prefill", 1), ("decode", 64))

# family, sparsity, phase and batch of each row of waterfalls: they show rounding, kernels and
# routers
WATERFALL_CASES = (
    ("width", 0.3, "prefill", 1),
    ("semi_structured", 0.5, "decode", 1),
    ("dynamic_depth", 0.5, "decode", 8),
)

# columns of the taxonomy and their roles
OPERATORS: Mapping[str, tuple[str, ...]] = {
    "q": ("q",),
    "k, v": ("k", "v"),
    "q · kᵀ": ("attention",),
    "o": ("o",),
    "gate, up": ("gate", "up"),
    "down": ("down",),
    "lm_head": ("lm_head",),
}

# model of the frontier if the paper's model has quality of fewer than two families
QUALITY_MODEL = "llama-2-7b"

Made = tuple[Any, str, tuple[str, ...]]  # a figure, its caption, and notes


class NothingToDraw(InputError):
    """A figure without data or room; the message names what is required."""


@dataclass(frozen=True)
class Paper:
    model: Model
    devices: tuple[HardwareProfile, ...]
    # number formats, engine, and the length if a figure varies none
    request: Request = field(default_factory=Request)
    # by device, to compare with predictions
    measured: Mapping[str, MeasuredGemms] = field(default_factory=dict)

    @property
    def title(self) -> str:
        return model_title(self.model.name)

    @property
    def setting(self) -> str:
        return f"{self.title}, {self.dtype}, {self.engine}"

    @property
    def engine(self) -> str:
        return engine_title(load_engine(self.request.engine).name)

    @property
    def dtype(self) -> str:
        """Format of the arithmetic."""
        return number_formats(self.request, self.model).dtype

    def settings(self, **changed: Any) -> dict[str, Any]:
        """Return the settings of the request with changes: keywords of :func:`simulator.table`."""
        return {**self.request.given, **changed}

    @property
    def interval(self) -> str:
        return interval(self.request.level)


def paper(model: str | Model, hardware: Sequence[str | HardwareProfile], **settings: Any) -> Paper:
    """Return a paper about a model on some devices; the settings are fields of
    :class:`simulator.Request`."""
    return Paper(load_model(model), tuple(profiles(hardware)), Request(**settings))


@dataclass(frozen=True)
class Drawn:
    name: str
    figure: Figure
    caption: str
    notes: tuple[str, ...] = ()


def draw(name: str, about: Paper) -> Drawn:
    if name not in FIGURES:
        raise unknown("figure", name, FIGURES)
    try:
        figure, caption, notes = FIGURES[name](about)
    except NoRoom as error:
        raise NothingToDraw(f"{name}: {error}") from None
    return Drawn(name, figure, caption, notes)


def _has_sparse24(p: Paper, engine: str) -> bool:
    """Return whether an engine has 2:4 kernels for the paper's number format; without an engine
    (""), always."""
    formats = number_formats(p.request, p.model)
    has = load_engine(engine).sparse24_kernels(formats.dtype, formats.weight_dtype) is not None
    return not engine or has


def _without_sparse24(p: Paper) -> str:
    if _has_sparse24(p, p.request.engine):
        return ""
    return f" 2:4 is excluded: {p.engine} has no kernels for it."


def _taxonomy(p: Paper) -> Made:
    if p.model.experts or p.model.latent:
        raise NothingToDraw(
            f"taxonomy: needs plain projections; {p.model.name} has routed experts or latent"
            " attention"
        )
    general = {name: FAMILIES[name] for name in general_families()}
    kept, adds = zip(*(_kept_and_added(p, name) for name in general))
    axes = [family.axis.replace("->", "→") for family in general.values()]
    figure = taxonomy_figure(list(general), axes, list(OPERATORS), kept, adds)
    caption = (
        "Share of the logical M (tokens over all layers), N (output features) and K (input"
        f" features) that each pruning family keeps in the GEMMs of {p.title} (projections as in"
        f" the checkpoint, outside any engine) at {100 * MAP_SPARSITY:.0f} % sparsity, in per cent"
        f" if below 100, and the operators that it adds. Prefill of {p.request.seq} tokens; KV"
        " cache: decode. In q · kᵀ, M is queries, N keys and K the features of all heads. Hollow"
        " markers: selected per token at inference."
    )
    return figure, caption, ()


def _kept_and_added(p: Paper, family: str) -> tuple[list[Any], str]:
    """Return the shares of M, N and K of each operator that a family keeps, and what it adds."""
    prefill, decode = (
        lower(replace(p.request, model=p.model, engine="", phase=phase))
        for phase in ("prefill", "decode")
    )
    dense = prefill if "prefill" in FAMILIES[family].support else decode
    pruned, skipped = prune(dense, family, MAP_SPARSITY), SKIPPED_PAIRS.get(family, "N")
    whole = prune(prefill, family, MAP_SPARSITY)
    added = dict.fromkeys(ROLES[code] for code in whole.role[whole.overhead])
    second = "one more GEMM each" if (pruned.stage == 2).any() else ""
    kept = [kept_axes(dense, pruned, roles, skipped) for roles in OPERATORS.values()]
    return kept, ", ".join(added) or second


def _roofline(p: Paper) -> Made:
    roofs = []
    for phase, batch in ROOFLINE_CASES:
        where = p.settings(phase=phase, batch=batch)
        found = explanations(
            p.model, p.devices, family=ROOFLINE_FAMILY, sparsity=ROOFLINE_SPARSITY, **where
        )
        roofs += [roof_of(e, f"{device(e.result)}\n{phase}, batch {batch}") for e in found]
    caption = (
        "GEMMs of the layers on the roofline, dense (circles) and with"
        f" {100 * ROOFLINE_SPARSITY:.0f} % of the width pruned (squares), at their predicted rates:"
        f" {p.setting}, {p.request.seq} tokens. Solid: the datasheet's rate; dashed: at the"
        " device's highest clock. Pruning the width moves every point to less work per byte."
    )
    return roofline_figure(roofs, columns=across(len(p.devices))), caption, ()


def _speedup(p: Paper) -> Made:
    found = table(
        [p.model],
        p.devices,
        "all",
        SPARSITIES,
        **p.settings(phase=["prefill", "decode"], batch=[1, 64]),
    )
    figure = speedups_of(found.rows)
    percents = with_and([f"{100 * s:.4g}" for s in SPARSITIES])
    caption = (
        f"Predicted speedup of every family at {percents} % sparsity with its {p.interval} and its"
        f" bounds: {p.setting}, prompt or cache of {p.request.seq} tokens. Dots left of 1: slower"
        " than the dense model."
    )
    return figure, caption + _without_sparse24(p), found.notes


def _waterfall(p: Paper) -> Made:
    panels = []
    notes = []
    own = p.request.engine
    sparse24 = next((name for name in (own, *sparse24_engines()) if _has_sparse24(p, name)), own)
    for family, sparsity, phase, batch in WATERFALL_CASES:
        engine = sparse24 if family == "semi_structured" else own
        try:
            where = p.settings(phase=phase, batch=batch, engine=engine)
            found = explanations(p.model, p.devices, family=family, sparsity=sparsity, **where)
        except InputError as error:  # no sparse tensor cores
            notes.append(f"waterfall of {family}: {error}")
            continue
        title = f"{label(family)}, {100 * sparsity:.0f} %\n{phase}, batch {batch}"
        panels += [steps_of(e, f"{device(e.result)}\n{title}") for e in found]
    caption = (
        f"From the nominal speedup 1/(1 - s) to the prediction: {p.setting}, {p.request.seq}"
        " tokens. Each step multiplies the speedup; orange: loss, hatched green: gain. The last"
        f" bar: prediction with its {p.interval}."
    )
    if sparse24 != own and not notes:
        caption += f" 2:4 is shown in {engine_title(sparse24)}: {p.engine} has no kernels for it."
    return waterfall_figure(panels, columns=across(len(p.devices))), caption, tuple(notes)


def _scatter(p: Paper) -> Made:
    clouds = []
    errors = []
    for hw in p.devices:
        if (seen := p.measured.get(hw.label)) is None:
            continue
        predicted = seen.predict(hw, p.dtype)
        title = device_title(hw.label)
        clouds.append(Cloud(title, seen.seconds, predicted))
        _, median, _, bias = agreement(seen.seconds, predicted)
        errors.append(
            f"{title}: {seen.source}, median error {100 * median:.1f} %, bias {100 * bias:+.1f} %"
        )
    if not clouds:
        names = ", ".join(hw.label for hw in p.devices)
        raise NothingToDraw(
            f"predicted against measured: no measured GEMMs of {names} (--measured)"
        )
    fitted = "some of these rows may have been used to fit the profiles"
    caption = (
        f"Predicted against measured times of single {p.dtype} GEMMs, and their ratio"
        f" (dashed: 10 %); {fitted}. {'; '.join(errors)}."
    )
    return scatter_figure(clouds), caption, ()


def _pareto(p: Paper) -> Made:
    model = p.model
    notes = []
    try:
        table = load_quality().of_model(model.name)
        few = len({r.family for r in table.on_axis(choose_axis(table)).rows}) < 2
    except InputError:
        few = True
    if few:
        reason = f"fewer than two families of {model.name} have quality on one axis"
        notes.append(f"pareto: {reason}; drawn for {QUALITY_MODEL}")
        model = load_model(QUALITY_MODEL)
        table = load_quality().of_model(QUALITY_MODEL)
    axis = choose_axis(table)
    found, more = fronts(model, p.devices, table, axis, **p.settings(phase=["prefill", "decode"]))
    figure = fronts_of(found)
    sources = "; ".join(dict.fromkeys(q.source for f in found for q in f.points))
    caption = (
        "Predicted speedup against measured quality loss with its frontier:"
        f" {replace(p, model=model).setting}, {p.request.seq} tokens. Quality: {axis.metric},"
        f" {axis.protocol} ({sources}). Numbers: removed, %. Faint: another point is better in"
        " both. Coloured steps: the fastest point of a family within each loss, which compares"
        " families at equal quality."
    )
    if any(q.family == "semi_structured" for q in table.on_axis(axis).rows):
        caption += _without_sparse24(p)
    return figure, caption, (*notes, *more)


_MAKERS = (
    _taxonomy,
    _roofline,
    _speedup,
    _waterfall,
    _scatter,
    _pareto,
)
# figures by name, in the order of a paper
FIGURES: Mapping[str, Callable[[Paper], Made]] = {f.__name__.lstrip("_"): f for f in _MAKERS}
