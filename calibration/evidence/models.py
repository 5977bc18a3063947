"""Compare what prunesim reads of a configuration with the model that Transformers builds of it:
``python -m calibration.evidence models [NAME ...]``.

Models are built on torch's meta device (:mod:`simulator.models.traced`). What Transformers built is
recorded, so that tests compare without it. Two products of a layer that one side computes as one
(query, key and value; gate and up) count as equal, if they have the same inputs and as many
outputs.
"""

from __future__ import annotations

import gzip
import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import Any

import yaml

from calibration.validation.scoring import table
from simulator.errors import InputError, unknown
from simulator.files.write import write_whole
from simulator.models.architectures import REFUSED, Reader
from simulator.models.library import decoder_of, from_hf_config, list_models, published_keys
from simulator.models.model import Model
from simulator.models.traced import (
    Product,
    TracedModel,
    TracedPart,
    TracedProduct,
    causal_types,
    outputs_by_inputs,
    trace,
    transformers_config,
)

HERE = Path(__file__).resolve().parent
TYPES: Mapping[str, Any] = yaml.safe_load((HERE / "model_types.yaml").read_text("utf-8"))
RELEASED = HERE / "released_models.jsonl"
"""Configurations of released checkpoints, one per line, each with its ``_source``."""
RECORD = HERE.parents[1] / "tests" / "models" / "transformers_models.json.gz"
"""What Transformers built of each configuration, with the default configurations themselves."""

DEFAULTS = "defaults"
RESULTS = ("exact", "different for a known reason", "refused", "not built", "different")

Shape = tuple[int, int]  # outputs and inputs of a product
Products = Sequence[tuple[str, Product]]  # products of a layer, with names


@dataclass(frozen=True)
class Case:
    """A configuration: the defaults of a model type, or that of a released checkpoint."""

    name: str
    source: str  # "defaults", or the address of a checkpoint
    content: Mapping[str, Any]

    @property
    def model_type(self) -> str:
        return str(self.content.get("model_type"))


@dataclass(frozen=True)
class Built:
    """What Transformers builds of a configuration, or its error."""

    case: Case
    error: str
    traced: TracedModel | None


@dataclass(frozen=True)
class Comparison:
    """Result of one case; ``lines`` describe differences."""

    case: Case
    result: str  # "exact", "exact, fused", or the kind of difference
    parameters: int | None  # parameters that Transformers builds
    lines: tuple[str, ...] = ()

    @property
    def known(self) -> str:
        """Reason of a difference that is right; else ""."""
        return str(TYPES["different"].get(self.case.name, ""))

    @property
    def kind(self) -> str:
        """One of :data:`RESULTS`."""
        begins = (kind for kind in RESULTS if self.result.startswith(kind))
        kind = next(begins, "different")
        return RESULTS[1] if self.known and kind != "exact" else kind


def default_cases() -> list[Case]:
    settings = TYPES["decoders"].items()
    return [Case(kind, DEFAULTS, {"model_type": kind, **some}) for kind, some in settings]


def released_cases() -> list[Case]:
    """Return configurations of released checkpoints, those of shipped models included."""
    shipped = [(name, published_keys(name)) for name in list_models()]
    lines = RELEASED.read_text("utf-8").splitlines() if RELEASED.exists() else []
    others = [(content["_name"], content) for content in map(json.loads, lines)]
    return [Case(name, content["_source"], content) for name, content in (*shipped, *others)]


def compare(model_built: Built) -> Comparison:
    case, traced = model_built.case, model_built.traced
    if traced is None:
        return Comparison(case, f"not built: {model_built.error}", None)
    if decoder_of(Reader(case.content, case.name)) is None:
        return Comparison(case, "refused: no table has the type", traced.parameters)
    try:
        model = from_hf_config(case.content, case.name, case.name)
    except InputError as error:
        return Comparison(case, f"refused: {error}", traced.parameters)
    lines, fused = _layer_lines(model, traced)
    missing = model.parameters - traced.parameters
    if lines:
        result = "products differ"
    elif missing:
        result = f"parameters differ by {missing:+,}"
    else:
        result = "exact, fused" if fused else "exact"
    if missing:
        lines += _parameter_lines(model, traced)
    for p in traced.rest.products:
        lines.append(f"outside the layers, not compared: {p.path} n={p.n:,} k={p.k:,} x {p.count}")
    return Comparison(case, result, traced.parameters, tuple(lines))


def _layer_lines(model: Model, traced: TracedModel) -> tuple[list[str], bool]:
    """Return lines that describe products that differ, per run of layers, and whether one side
    computes as one product what the other computes as several."""
    once = [ours for ours, layer in zip(model.products, model.layers) if not layer.reused]
    if len(once) != len(traced.layers):
        numbers = f"{len(traced.layers)} in Transformers, {len(once)} in prunesim"
        return [f"layers: {numbers}"], False
    lines = []
    fused = False
    pairs = enumerate(zip(traced.layers, once))
    for (part, products), run in groupby(pairs, key=lambda pair: pair[1]):
        theirs = [(p.path, (p.n, p.k, p.count)) for p in part.products]
        ours = [*products.items()]
        fused |= _shapes(theirs) != _shapes(ours)
        if different := [*_different_products(theirs, ours)]:
            lines += [f"layers {_range([number for number, _ in run])}:", *different]
    return lines, fused


def _shapes(products: Products) -> Counter[Shape]:
    counts: Counter[Shape] = Counter()
    for _, (n, k, count) in products:
        counts[n, k] += count
    return counts


def _different_products(theirs: Products, ours: Products) -> Iterator[str]:
    """Yield a line per product that one side alone has and that the other side does not fuse."""
    left, right = (outputs_by_inputs(p for _, p in side) for side in (theirs, ours))
    for title, some, others in (("Transformers", theirs, ours), ("prunesim", ours, theirs)):
        names = {(n, k): name for name, (n, k, _) in some}
        for (n, k), count in (_shapes(some) - _shapes(others)).items():
            if left.get(k) != right.get(k):
                yield f"  only in {title}: {names[n, k]} n={n:,} k={k:,} x {count}"


def _range(numbers: Sequence[int]) -> str:
    return str(numbers[0]) if len(numbers) == 1 else f"{numbers[0]} to {numbers[-1]}"


def _parameter_lines(model: Model, traced: TracedModel) -> list[str]:
    """Return the differences of parameters, prunesim less Transformers, per layer and outside."""
    by_layer = [model.parameters_of(layer) for layer in model.layers if not layer.reused]
    lines = []
    if len(by_layer) == len(traced.layers):
        pairs = enumerate(zip(traced.layers, by_layer))
        differences = [(ours - part.parameters, number) for number, (part, ours) in pairs]
        for missing, run in groupby(differences, key=lambda pair: pair[0]):
            if missing:
                lines.append(f"layers {_range([n for _, n in run])}: parameters {missing:+,} each")
    ours = model.parameters - model.layer_parameters
    if missing := ours - traced.rest.parameters - traced.head.parameters:
        parts = f"{traced.rest.parameters:,} and the head {traced.head.parameters:,}"
        lines.append(f"outside the layers: parameters {missing:+,}; Transformers has {parts}")
    return lines


def build(case: Case) -> Built:
    """Build a case with the installed Transformers; a default configuration gets all its keys."""
    try:
        config = transformers_config(case.content, case.name)
        traced = trace(config, case.name)
    except InputError as error:
        return Built(case, str(error), None)
    if case.source == DEFAULTS:
        content = json.loads(config.to_json_string(use_diff=False))
        case = Case(case.name, case.source, content)
    return Built(case, "", traced)


def selected(names: Sequence[str]) -> list[Case]:
    """Return the cases of model types, released models and files; all without names."""
    cases = [*default_cases(), *released_cases()]
    known = {case.name for case in cases}
    found = []
    for name in names:
        if name not in known and Path(name).is_file():
            found.append(Case(name, name, json.loads(Path(name).read_text("utf-8"))))
        elif name not in known:
            raise unknown("model", name, known, way="A path of a config.json is accepted too.")
    return found + [case for case in cases if not names or case.name in names]


def unlisted_types() -> list[str]:
    """Return the model types of the installed Transformers that the list does not have."""
    return sorted(causal_types() - TYPES["decoders"].keys() - REFUSED.keys())


def report(names: Sequence[str]) -> tuple[str, bool]:
    """Return the text of the command, and whether every model that prunesim reads is exact."""
    found = [compare(build(case)) for case in selected(names)]
    lines = []
    for c in found:
        size = "" if c.parameters is None else f" ({c.parameters:,} parameters)"
        lines += [f"{c.case.name}: {c.result}{size}", *(f"  {line}" for line in c.lines)]
    kinds = Counter(c.kind for c in found)
    lines.append(f"{kinds['exact']} of {len(found)} exact, {kinds['different']} different")
    if not names:
        lines.append(f"types that the list lacks: {', '.join(unlisted_types()) or 'none'}")
    return "\n".join(lines), not kinds["different"]


def page_tables(found: Sequence[Comparison]) -> list[str]:
    """Return the tables of ``docs/generated/models.md``: numbers of results, model types, released
    models, and types that may be refused."""
    types = [c for c in found if c.case.source == DEFAULTS]
    released = [c for c in found if c.case.source != DEFAULTS]
    numbers = []
    for title, some in (("types at default settings", types), ("released", released)):
        kinds = Counter(c.kind for c in some)
        numbers.append([title, str(len(some)), *(str(kinds[kind]) for kind in RESULTS)])
    sizes = {c.case.name: "" if c.parameters is None else f"{c.parameters:,}" for c in found}
    reasons = [[kind, reason] for kind, reason in REFUSED.items()]
    defaults = [[c.case.name, sizes[c.case.name], _short(c)] for c in types]
    models = [
        [
            f"[{c.case.name}]({c.case.source})",
            c.case.model_type,
            sizes[c.case.name],
            c.case.content.get("_obtained", "shipped").split(":")[0].split(",")[0],
            _short(c),
        ]
        for c in released
    ]
    return [
        table(["configurations", "number", *RESULTS], numbers),
        table(["type", "parameters", "result"], defaults, left=(0, 2)),
        table(["model", "type", "parameters", "file", "result"], models, left=(0, 1, 3, 4)),
        table(["type", "reason"], reasons, left=(0, 1)),
    ]


def _short(c: Comparison) -> str:
    """Return the result in a cell: an error without the name and without known types."""
    error = re.split("; expected one of|; the nearest", c.result.replace(f"{c.case.name}: ", ""))[0]
    return error + (f" ({c.known})" if c.known else "")


def record_tables() -> list[str]:
    """Build every model, record what Transformers built, and return the tables of the page."""
    built = [build(case) for case in selected(())]
    write_record(built)
    return page_tables([*map(compare, built)])


def write_record(models: Iterable[Built]) -> None:
    entries = [
        {
            "name": b.case.name,
            "source": b.case.source,
            **({"content": b.case.content} if b.case.source == DEFAULTS else {}),
            **({"traced": _packed(b.traced)} if b.traced else {"error": b.error}),
        }
        for b in models
    ]
    text = json.dumps(entries, sort_keys=True, separators=(",", ":"))
    write_whole(RECORD, gzip.compress(text.encode(), mtime=0))


def recorded() -> list[Built]:
    """Return what Transformers built when the record was made."""
    released = {case.name: case for case in released_cases()}
    found = []
    for entry in json.loads(gzip.decompress(RECORD.read_bytes())):
        name = entry["name"]
        source = entry["source"]
        case = Case(name, source, entry["content"]) if source == DEFAULTS else released[name]
        traced = _unpacked(entry["traced"]) if "traced" in entry else None
        found.append(Built(case, entry.get("error", ""), traced))
    return found


def _packed(traced: TracedModel) -> dict[str, Any]:
    """Return a traced model as plain values; equal layers are stored once."""
    kinds = list(dict.fromkeys(traced.layers))
    order = [kinds.index(layer) for layer in traced.layers]
    return {**asdict(replace(traced, layers=tuple(kinds))), "order": order}


def _unpacked(entry: Mapping[str, Any]) -> TracedModel:
    kinds = [_unpacked_part(part) for part in entry["layers"]]
    return TracedModel(
        layers=tuple(kinds[index] for index in entry["order"]),
        rest=_unpacked_part(entry["rest"]),
        head=_unpacked_part(entry["head"]),
        apart=entry["apart"],
    )


def _unpacked_part(part: Mapping[str, Any]) -> TracedPart:
    products = tuple(TracedProduct(**product) for product in part["products"])
    norms = tuple((path, size) for path, size in part["norms"])
    return TracedPart(products, part["parameters"], norms)
