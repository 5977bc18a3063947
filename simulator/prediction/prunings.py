"""Define how a dense model is pruned: by a family at a sparsity, by a published method, or as an
existing pruned model.

Use :func:`prunings_of` for the prunings that a user requests, :func:`removed_parts` for what is
left of each part of the model: layers, query and KV heads, inner widths of MLP and experts,
experts, and the hidden size. Sizes are means over the layers that have the part, on all devices
together.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from simulator.arguments import is_size, listed, shown
from simulator.errors import InputError, unknown
from simulator.models.library import load_model
from simulator.models.lower import lower
from simulator.models.model import Model, pruned_from, undivided
from simulator.models.quantization import FORMATS
from simulator.prediction.requests import computed_on, distinct, once, requests_of
from simulator.pruning import FAMILIES, check_fraction, prune_model
from simulator.pruning._family import SUFFIXES
from simulator.pruning._steps import PruningStep, is_plan, prune_steps, read_steps
from simulator.request import DEFAULT_DTYPE, Applied, Request
from simulator.units import percent
from simulator.workload import Workload

if TYPE_CHECKING:
    from simulator.hardware.profile import HardwareProfile
    from simulator.pruning._methods import Method

SPARSITIES: tuple[float, ...] = (0.1, 0.25, 0.5)  # default sparsities
ALIKE = (
    *("engine", "phase", "batch", "seq", "new_tokens", "cached_prefix", "token_budget"),
    *("dtype", "devices", "parallel", "link"),
)
"""Settings that a pruned and a dense workload must share."""

Excluded = dict[str, list[float]]  # reason -> excluded sparsities


@dataclass(frozen=True)
class Pruning:
    """One way to prune a model: steps of families or methods, or an existing pruned model."""

    steps: tuple[PruningStep, ...]
    # the existing pruned model; its sparsity is the share of parameters removed
    model: Model | None = None
    text: str = ""  # text of --prune, or the path of a plan; "": a family or method at a sparsity
    # number formats by setting that replace those of the request
    formats: tuple[tuple[str, str | None], ...] = ()

    @classmethod
    def of(
        cls,
        name: str | Method,
        sparsity: float | Mapping[str, float] | None = None,
        options: Mapping[str, Any] | None = None,
    ) -> Pruning:
        """Return the pruning of a family or a method."""
        hashable = {n: tuple(v) if isinstance(v, list) else v for n, v in (options or {}).items()}
        step = PruningStep(str(name), options=tuple(sorted(hashable.items())))
        if not isinstance(name, str) or name.endswith(SUFFIXES):
            from simulator.pruning._methods import load_method

            described = load_method(name)
            title = name if isinstance(name, str) else described.name
            step = replace(step, name=title, described=described)
        return cls((step,)).at(sparsity)

    @classmethod
    def read(cls, text: str | Method | Pruning) -> Pruning:
        """Return the pruning of a text of ``--prune`` (:mod:`simulator.pruning._steps`), of a
        method at its only sparsity, or a pruning as it is."""
        if isinstance(text, Pruning):
            return text
        steps = read_steps(text)
        found = cls(steps, text=" + ".join(map(str, steps)))
        if isinstance(text, str) and is_plan(text) and not found.described:
            return replace(found, text=text.strip())
        return found

    @classmethod
    def of_model(cls, dense: Model, pruned: Model) -> Pruning:
        _, families, share = difference_of(dense, pruned)
        return cls((PruningStep("+".join(families) or "none", share),), model=pruned)

    def at(self, sparsity: float | Mapping[str, float] | None) -> Pruning:
        (step,) = self.steps
        parts = tuple(sparsity.items()) if isinstance(sparsity, Mapping) else sparsity
        return replace(self, steps=(replace(step, sparsity=parts),))

    @property
    def other(self) -> bool:
        """Whether number formats may differ from those of the dense model."""
        return self.model is not None or bool(self.formats)

    def request(self, request: Request) -> Request:
        """Return a request with the number formats of this pruning."""
        changed: dict[str, Any] = dict(self.formats)
        return replace(request, **changed) if changed else request

    def computed(self, request: Request, hw: HardwareProfile) -> Pruning:
        """Return the pruning with the number formats in which the engine computes them on a
        device."""
        if not self.formats:
            return self
        wide = computed_on(self.request(request), hw)
        return replace(self, formats=tuple((name, getattr(wide, name)) for name in FORMATS))

    @cached_property
    def family(self) -> str:
        """Families of the steps, joined by "+"."""
        names = dict.fromkeys(family.name for step in self.steps for family in step.families)
        return "+".join(names) or self.steps[0].name

    @property
    def sparsity(self) -> float | None:
        """Fraction of a single step; None for sizes, parts, listed layers and several steps."""
        step = self.steps[0]
        scalar = len(self.steps) == 1 and step.layers is None and not is_size(step.sparsity)
        return step.sparsity if scalar and isinstance(step.sparsity, float | int) else None

    @property
    def method(self) -> str:
        """Name of the method of a single step; the title of steps with a described method; else
        ""."""
        if len(self.steps) > 1:
            return self.title if self.described else ""
        method = self.steps[0].method
        return method.name if method is not None else ""

    @property
    def described(self) -> tuple[Method, ...]:
        """Methods that are not published: their names stand for their files."""
        return tuple(step.described for step in self.steps if step.described is not None)

    @property
    def title(self) -> str:
        """Name of the existing model, text, method or family."""
        if self.model is not None:
            return self.model.name
        if self.steps == _UNPRUNED:
            return "dense"
        if self.text and self.described:
            return " + ".join(step.title for step in self.steps)
        return self.text or self.method or self.family

    @property
    def prune(self) -> str:
        """Text of ``--prune``; "" for an existing model, and for workloads that were pruned
        before."""
        known = self.model is None and all(step.families for step in self.steps)
        return self.text or (" + ".join(map(str, self.steps)) if known else "")

    @property
    def label(self) -> str:
        """Options as text: ``align=64``."""
        if len(self.steps) == 1 and (method := self.steps[0].method):
            return _options(sorted(method.options.items()))
        return ",".join(filter(None, (_options(step.options) for step in self.steps)))

    @property
    def sets_sparsity(self) -> bool:
        """Whether a step takes no sparsity: it follows from the length of a request, or from a
        method."""
        return any(step.sets_sparsity for step in self.steps)

    @cached_property
    def together(self) -> str:
        """Requests that one call may prune together: see :class:`simulator.pruning.Family`."""
        kinds = {family.together for step in self.steps for family in step.families}
        kinds |= {"equal length"} if self.sets_sparsity else set()
        return next((kind for kind in ("one", "equal length") if kind in kinds), "any")

    def lacking(self, model: Model) -> str:
        """Return which part for this pruning a model lacks, else ""."""
        for lacks in (family.needs for step in self.steps for family in step.families):
            if lacks and not getattr(model, lacks):
                return f"{model.name} has no routed {lacks}"
        return ""

    def apply(
        self,
        dense: Workload,
        request: Request,
        lowered: Callable[[Model], Workload] | None = None,
    ) -> Workload:
        """Return the pruned workload of a request; ``lowered`` makes the workload of a pruned model
        (default: that of the request)."""
        if self.formats:
            request = self.request(request)
            return replace(self, formats=()).apply(lower(request), request)
        if self.model is not None:
            model = pruned_from(load_model(request.model), self.model)
            pruned = lower(replace(request, model=model))
            check_alike(dense, pruned)
            return as_pruned(dense, pruned)
        if self.steps == _UNPRUNED:
            return dense
        return prune_steps(
            dense,
            self.steps,
            ideal=request.ideal,
            plan=self.text if is_plan(self.text) else "",
            named=bool(self.text),
            lowered=lowered,
        )

    def requested(self, pruned: Workload) -> float:
        if self.sparsity is not None:
            return float(self.sparsity)
        steps = [step.sparsity for step in pruned.meta.applied]
        return steps[0] if len(steps) == 1 else 1.0 - math.prod(1.0 - s for s in steps)


_UNPRUNED = (PruningStep("none", 0.0),)
"""Steps of the dense model in other number formats."""


def in_formats(
    prunings: Sequence[Pruning], every: Sequence[Request]
) -> tuple[tuple[Pruning, ...], tuple[Request, ...]]:
    """Return the prunings, then the dense model and the prunings in every further combination of
    number formats of the requests; and the requests in the first combination, which all speedups
    are against."""
    formats = once(tuple((name, getattr(r, name)) for name in FORMATS) for r in every)
    if len(formats) < 2:
        return tuple(prunings), tuple(every)
    changed = [tuple(pair for pair in other if pair not in formats[0]) for other in formats[1:]]
    dense = [Pruning(_UNPRUNED, formats=other) for other in changed]
    pruned = [replace(p, formats=other) for p in prunings for other in ((), *changed)]
    first: dict[str, Any] = dict(formats[0])
    return (*dense, *pruned), once(replace(r, **first) for r in every)


def _options(options: Iterable[tuple[str, Any]]) -> str:
    return ",".join(
        f"{name}={list(value) if isinstance(value, tuple) else value}" for name, value in options
    )


def families(names: Sequence[str], models: Sequence[Model] = ()) -> tuple[str, ...]:
    """Return names of families, each once; ``all`` selects every family that applies to at least
    one of the models."""
    for name in names:
        if not isinstance(name, str) or (name != "all" and name not in FAMILIES):
            raise unknown("family", name, [*FAMILIES, "all"])
    every = [
        name
        for name, f in FAMILIES.items()
        if not f.needs or any(getattr(m, f.needs) for m in models)
    ]
    chosen = (every if name == "all" else [FAMILIES[name].name] for name in names)
    return once(family for some in chosen for family in some)


def prunings_of(
    models: Sequence[Model],
    family: Sequence[str] | None = None,
    method: Sequence[str | Method] = (),
    pruned: Sequence[str | Model] = (),
    sparsity: Sequence[float] | None = None,
    options: Mapping[str, Any] | None = None,
    prune: Sequence[str | Method | Pruning] = (),
) -> tuple[Pruning, ...]:
    """Return the prunings of existing pruned models, of texts of ``--prune``, of published methods
    and of families (None: all, if there is nothing else); methods and families at every sparsity
    (None: :data:`SPARSITIES`, or those of a method's paper)."""
    whole = (*_existing(models, pruned), *once(Pruning.read(text) for text in prune))
    if not whole or method or family is not None:
        apart = _at_sparsities(models, family, method, sparsity, options)
        return named_apart((*whole, *apart))
    if options or sparsity is not None:
        raise InputError(
            "sparsity, option: expected with a family or a method; a text of --prune and a pruned"
            " model state the whole pruning"
        )
    return named_apart(whole)


def _existing(models: Sequence[Model], pruned: Sequence[str | Model]) -> tuple[Pruning, ...]:
    if pruned and len(models) != 1:
        raise InputError(f"pruned: expected one dense model, got {len(models)}")
    existing = _named([(source, load_model(source)) for source in pruned])
    for model in existing:
        refuse_equal(models[0], model)
    return tuple(Pruning.of_model(models[0], model) for model in existing)


def _at_sparsities(
    models: Sequence[Model],
    family: Sequence[str] | None,
    method: Sequence[str | Method],
    sparsity: Sequence[float] | None,
    options: Mapping[str, Any] | None,
) -> tuple[Pruning, ...]:
    """Return published methods, or families, each at every sparsity."""
    if method and (family is not None or options):
        raise InputError(
            "method: sets its own family and options; give no family or option with it"
        )
    fractions = None if sparsity is None else once(check_fraction(s) for s in sparsity)
    found: list[tuple[Pruning, tuple[float, ...]]]  # with default sparsities
    if method:
        from simulator.pruning._methods import load_method

        methods = {Pruning.of(name): load_method(name) for name in method}
        found = [(p, one.sparsities or SPARSITIES) for p, one in methods.items()]
    else:
        names = families(("all",) if family is None else family, models)
        only = ((name, FAMILIES[name].default) for name in names)  # 2:4 has one sparsity
        found = [
            (Pruning.of(name, options=options), SPARSITIES if s is None else (s,))
            for name, s in only
        ]
    if fractions is not None and (own := next((p for p, _ in found if p.sets_sparsity), None)):
        raise InputError(
            f"sparsity: expected none for {own.title}: it follows from the length and the budget,"
            " or from the method"
        )
    for name, values in (("family", found), ("sparsity", (0,) if fractions is None else fractions)):
        if not values:
            raise InputError(f"{name}: expected at least one")
    return tuple(
        p.at(s)
        for p, default in found
        for s in ((None,) if p.sets_sparsity else default if fractions is None else fractions)
    )


def named_apart(prunings: Sequence[Pruning]) -> tuple[Pruning, ...]:
    """Return prunings; InputError if two methods have one name."""
    methods: dict[str, Method] = {}
    for step in (step for pruning in prunings for step in pruning.steps):
        if step.method and methods.setdefault(step.method.name, step.method) != step.method:
            raise InputError(f"{step.name}: another method has the name {step.method.name} too")
    return tuple(prunings)


def dividing(pruning: Pruning, model: Model, devices: int, parallel: str) -> Pruning:
    """Return the pruning of families at a fraction with the nearest sizes that devices can divide
    equally: KV heads, inner widths and experts. If the fraction itself leaves such sizes, the
    pruning is unchanged."""
    if devices == 1 or parallel == "pipeline" or pruning.model is not None:
        return pruning
    static = [step for step in pruning.steps if not any(f.dynamic for f in step.families)]
    try:
        pruned = prune_model(model, " + ".join(map(str, static))) if static else model
    except InputError:
        return pruning
    if undivided(pruned.layers, devices, parallel) is None:
        return pruning
    steps = [_dividing_step(step, model, devices, parallel) for step in pruning.steps]
    return Pruning.read(" + ".join(steps))


def _dividing_step(step: PruningStep, model: Model, devices: int, parallel: str) -> str:
    share = step.sparsity
    if not isinstance(share, float) or step.layers is not None:
        return str(step)
    if step.name == "experts" and not step.options and parallel == "expert":
        return f"experts {_nearest(model.experts, share, devices)}"
    if step.name == "width" and not step.options:
        groups = _nearest(model.kv_heads, share, devices)
        unit = math.lcm(16, devices)
        align = f" align={unit}" if unit > 16 else ""
        return f"width attention={groups} mlp={share:.9g}{align}"
    return str(step)


def _nearest(size: int, share: float, devices: int) -> int:
    """Return the multiple of ``devices``, at least one, that is nearest to what remains."""
    return max(round((1.0 - share) * size / devices), 1) * devices


def refuse_equal(dense: Model, pruned: Model) -> None:
    """Raise InputError for a pruned model that equals the dense model in all that is predicted."""
    first, second = (
        replace(model, name="", architecture="", max_positions=1) for model in (dense, pruned)
    )
    if first == second:
        raise InputError(
            f"pruned: {pruned.name} has the shapes, number formats and declared sparsity of"
            f" {dense.name}; a configuration does not state scattered zeros, which no kernel skips"
        )


KEYWORDS = ("family", "sparsity", "method", "pruned", "prune", "options")
"""Keywords that state prunings, see :func:`simulator.table`."""


def asked(
    models: Sequence[Model], settings: Mapping[str, Any]
) -> tuple[tuple[Pruning, ...], list[Request], tuple[str, ...]]:
    """Return the prunings and the requests that keywords state, and notes on pruned models that
    cannot be read."""
    own = {
        name: value for name, value in settings.items() if name in KEYWORDS and value is not None
    }
    options = own.pop("options", None)
    if not isinstance(options, Mapping | None):
        raise InputError(f"options: expected a mapping from option to value, got {shown(options)}")
    own = {name: listed(name, value) for name, value in own.items()}
    own["pruned"], skipped = readable(own.get("pruned", ()))
    requests = requests_of(
        models, {name: value for name, value in settings.items() if name not in KEYWORDS}
    )
    prunings = prunings_of(models, **own, options=options)
    chosen = options or any(own.get(name) for name in ("sparsity", "prune", "pruned", "method"))
    if not chosen and len(models) == 1:
        devices, parallel = requests[0].devices, requests[0].parallel
        prunings = once(dividing(p, models[0], devices, parallel) for p in prunings)
    return prunings, requests, skipped


def readable(pruned: Sequence[str | Model]) -> tuple[list[Model], tuple[str, ...]]:
    """Return the existing pruned models that can be read, and one note for each other; raise the
    error if there is none, or if two have one name. Checkpoints often keep the name of the model
    that they were pruned from: several of one name are named after their folders."""
    found: list[tuple[object, Model]] = []
    errors: list[InputError] = []
    for source in pruned:
        try:
            found.append((source, load_model(source)))
        except InputError as error:
            errors.append(error)
    if errors and not found:
        raise errors[0]
    return _named(found), tuple(f"{error}: this pruned model is skipped" for error in errors)


def _named(found: Sequence[tuple[object, Model]]) -> list[Model]:
    """Return models by source, each once; different ones of one name get the names of their
    folders, or are an error."""
    named = []
    for source, model in found:
        several = any(other.name == model.name and other != model for _, other in found)
        if several and isinstance(source, str):
            path = Path(source)
            folder = path.parent if path.name == "config.json" else path
            model = replace(model, name=folder.name or model.name)
        named.append((source, model))
    return distinct(named, "pruned")


def exclude(excluded: Excluded, pruning: Pruning, reason: str, device: str = "") -> None:
    title, sparsity = pruning.title, pruning.sparsity
    if device:
        reason = f"{title} on {device}: {reason}"
    else:
        reason = reason.replace(f" at sparsity {sparsity or 0.0:g}", "")
        reason = reason if title in reason.partition(": ")[0] else f"{title}: {reason}"
    at = excluded.setdefault(reason, [])
    if sparsity is not None and not pruning.text:
        at.append(float(sparsity))


def excluded_lines(excluded: Excluded, most: int | None = None) -> tuple[str, ...]:
    """Return one line per reason, with its sparsities; of more than ``most`` only the ends."""
    out = []
    for reason, at in excluded.items():
        values = [f"{s:g}" for s in sorted(set(at))]
        if most is not None and len(values) > most:
            values = [*values[: most // 2], "...", values[-1]]
        out.append(f"{reason}: excluded{' at sparsity ' if values else ''}{', '.join(values)}")
    return tuple(out)


# -- existing pruned models ------------------------------------------------------------------------


@lru_cache(maxsize=64)
def difference_of(dense: Model, pruned: Model) -> tuple[tuple[str, ...], tuple[str, ...], float]:
    """Return how a pruned model differs from its dense model in lines, its families, and the
    removed share of all parameters."""
    from simulator.models.difference import difference

    lines = difference(dense, pruned)
    words = (re.match("[a-z_]+", line) for line in lines)
    names = dict.fromkeys(word[0] for word in words if word and word[0] in FAMILIES)
    after, before = (
        lower(model, phase="decode", seq=1, engine="", weight_dtype=DEFAULT_DTYPE).parameters
        for model in (pruned, dense)
    )
    return lines, tuple(names), 1.0 - after / before


def check_alike(dense: Workload, pruned: Workload) -> None:
    for name in ALIKE:
        theirs, ours = _setting(pruned, name), _setting(dense, name)
        if theirs != ours:
            raise InputError(
                f"{name}: the pruned model has {theirs!r}, the dense {ours!r}; expected the same"
            )


def _setting(w: Workload, name: str) -> Any:
    # checkpoints may state different arithmetic for one request
    return w.meta.asked.dtype or DEFAULT_DTYPE if name == "dtype" else getattr(w.meta, name)


def source_of(w: Workload) -> Model | None:
    """Return the model that the request of a workload names, before any pruning step."""
    return w.meta.request.model if w.meta.request is not None else None


def as_pruned(dense: Workload, pruned: Workload) -> Workload:
    """Return the workload of a pruned model with its difference from the dense model as a pruning
    step."""
    own, ours, theirs = (
        pruned.meta.applied[len(dense.meta.applied) :],
        source_of(dense),
        source_of(pruned),
    )
    other = ours is not None and theirs is not None and ours is not theirs and ours != theirs
    if own and not other:
        return pruned
    _, names, share = difference_of(ours, theirs) if other else ((), (), 0.0)
    step = Applied("+".join(names) or "none", share, share)
    if own[:1] == (step,):  # already recorded
        return pruned
    return pruned.replace(meta=replace(pruned.meta, applied=(*dense.meta.applied, step, *own)))


def applied(dense: Workload, pruned: Workload) -> tuple[str, float, float]:
    """Return the families that pruned a workload, joined by "+", and their total sparsity,
    requested and realised."""
    steps = as_pruned(dense, pruned).meta.applied[len(dense.meta.applied) :]
    requested = float(1.0 - math.prod(1.0 - step.sparsity for step in steps))
    realised = float(1.0 - math.prod(1.0 - step.realised for step in steps))
    return "+".join(step.family for step in steps) or "none", requested, realised


ROUNDED = 0.02
"""Difference of the requested and the realised share of KV heads from which the part ``heads`` is
mentioned."""


_KIND = " sublayers"  # ending of the number of sublayers of one kind


@lru_cache(maxsize=512)
def sizes(model: Model) -> Mapping[str, float]:
    """Return the sizes of the parts of a model by name; those of sublayers are means over the
    layers that have them."""
    counts, totals = Counter[str](), dict[str, float]()
    for run in model.runs:
        for sublayer in run.layer.sublayers:
            for name, size in sublayer.sizes().items():
                counts[name] += run.length
                totals[name] = totals.get(name, 0.0) + run.length * size
    return {
        "attention layers": model.sizes("attention layers")[0],
        "MLP layers": model.sizes("MLP layers")[0],
        "layers": len(model.layers),
        **{f"{kind}{_KIND}": many for kind, many in model.kinds.items()},
        **{name: total / counts[name] for name, total in totals.items()},
        "hidden size": model.hidden,
    }


def removed_parts(
    steps: Sequence[PruningStep], dense: Mapping[str, float], pruned: Mapping[str, float]
) -> str:
    """Return what steps remove of each part of a workload: the requested share, the realised one,
    and both :func:`sizes`."""
    if any(family.parts is None for step in steps for family in step.families):
        return ""
    before, after = dict(dense), {**dict.fromkeys(dense, 0.0), **pruned}
    asked = _requested(steps)
    kinds = [name for name in before if name.endswith(_KIND)]
    names = [name for name in before if name not in ("layers", *kinds)]
    if (
        before["attention layers"] == before["MLP layers"]
        and after["attention layers"] == after["MLP layers"]
    ):
        for found in (before, after):
            found["layers"] = found.pop("attention layers")
        names = ["layers", *names[2:]]
    elif len(kinds) > 2 and not asked.keys() & {*names[:2]}:  # parts of a hybrid: several kinds
        names = ["layers", *kinds, *names[2:]]
    asked = {n: 1.0 - s / before[n] if is_size(s) else s for n, s in asked.items() if before.get(n)}
    changed = [
        name
        for name in names
        if before[name] > 0 and (before[name] != after[name] or asked.get(name))
    ]
    grouped = "heads" in changed and "KV heads" in changed and "KV heads" in asked
    out = []
    for name in changed:
        if grouped and name == "heads":
            continue
        share, size = 1.0 - after[name] / before[name], _size(before[name])
        sizes_text = f"{size} to {_size(after[name])}" if share else f"still {size}"
        if grouped and name == "KV heads":
            sizes_text += f", heads {_size(before['heads'])} to {_size(after['heads'])}"
        wanted = asked.get(name)
        if wanted is not None and percent(wanted) != percent(share):
            sizes_text = f"{percent(wanted)} requested, {sizes_text}"
        text = f"{name} {percent(share)} ({sizes_text})"
        if wanted is not None and name == "KV heads" and abs(wanted - share) >= ROUNDED:
            text += _alone(steps, wanted)
        out.append(text)
    return "; ".join(out)


def _alone(steps: Sequence[PruningStep], wanted: float) -> str:
    """Return how to prune query heads alone, if the request names groups of heads."""
    named = any(part in ("", "attention") for step in steps for part in _fractions(step))
    return (
        f", as a KV head goes with its query heads: heads={wanted:g} removes query heads alone"
        if named
        else ""
    )


def _requested(steps: Sequence[PruningStep]) -> dict[str, float]:
    """Return the requested share of each size that one step of all layers changes."""
    out: dict[str, float] = {}
    twice: set[str] = set()
    for step in steps:
        parts = FAMILIES[step.name].parts if step.name in FAMILIES else None
        for part, fraction in _fractions(step).items():
            for name in (parts or {}).get(part, ()):
                if name in out:
                    twice.add(name)
                out[name] = fraction
    return {name: fraction for name, fraction in out.items() if name not in twice}


def _fractions(step: PruningStep) -> dict[str, float]:
    if step.layers is not None or {"unit", "fewer"} & dict(step.options or ()).keys():
        return {}
    if isinstance(step.sparsity, tuple):
        pairs = (pair for pair in step.sparsity if isinstance(pair, tuple))
        return {part: fraction for part, fraction in pairs if isinstance(fraction, float | int)}
    return {} if step.sparsity is None else {"": step.sparsity}


def _size(value: float) -> str:
    return f"{value:,.0f}" if value == round(value) or value >= 1000 else f"{value:.1f}"
