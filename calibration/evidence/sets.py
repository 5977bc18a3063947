"""The sets of evidence: their rows, what was held out, how the rows are predicted and scored, and
their targets."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from itertools import chain
from multiprocessing import get_context
from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from calibration.evidence.build_profiles import STAGED
from calibration.evidence.measurements import published
from calibration.evidence.measurements.wheel import SOURCES, datasheet, open_wheel, read_source
from calibration.fit.attention import SHAPE, AttentionFit, calls_of, fit_attention
from calibration.fit.gemm import GemmFit, fit_gemm, products_of
from calibration.fit.operators import PART_ROLES, layers_of
from calibration.fit.predict import predict
from calibration.fit.section import LEVEL, Fit, fit_section, neighbours, pairs_along
from calibration.measurements import list_measurements, load_measurements, provenance
from calibration.records.screening import LATENT
from calibration.records.timing_table import Records, Source
from calibration.validation.scoring import ScoredRows, score
from simulator.arrays import Array, FloatArray, IndexArray
from simulator.codes import ROLES, STACKS, formats_of
from simulator.errors import unknown
from simulator.hardware.library import inheriting, load_hardware
from simulator.hardware.profile import Fitted, HardwareProfile, Section
from simulator.operators.attention import AttentionCalls
from simulator.operators.base import Machine
from simulator.operators.collective import COLLECTIVE_CONSTANTS
from simulator.operators.experts import Layers
from simulator.operators.gemm import Products
from simulator.prediction.requests import by_key
from simulator.uncertainty.forward import ratio_half

Row = dict[str, Any]
DATA: Mapping[str, Any] = yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text("utf-8"))

# Held-out groups of attention: heads and KV heads, or query lengths (prefill) and cache lengths
# (decode)
GROUPINGS = ("heads", "lengths")
TEST_SHARE = 0.3
SEEDS, FEW = (0, 1, 2), 400  # seeds of the splits, and rows of a small fit of GEMMs
# most held-out rows of a profile, and most pairs of rows: random samples
MOST_ROWS, MOST_PAIRS = 3000, 4000


@dataclass(frozen=True)
class MeasuredRows:
    data: Fit
    hw: HardwareProfile  # the datasheet of their device
    dtype: str = "bf16"

    def pairs(self, by: str = "") -> IndexArray:
        """Return pairs (smaller, larger) that differ in one size, by a ratio in [0.25, 1): for
        GEMMs any size, for experts their width or number, for attention the KV groups with their
        query heads ("heads") or the length."""
        c = self.data.calls
        if isinstance(c, Products):
            return neighbours((c.m, c.n, c.k))
        if isinstance(c, Layers):
            same = [c.m, c.k, c.active, c.skew, c.part]
            return np.concatenate(
                [pairs_along(c.n, [*same, c.experts]), pairs_along(c.experts, [*same, c.n])]
            )
        assert isinstance(c, AttentionCalls)
        g = c.geometry
        if by == "lengths":
            length = g.kv_len if c.phase == "decode" else g.q_len
            return pairs_along(length, [g.batch, g.heads, g.kv_heads, g.head_dim])
        if c.latent:
            return pairs_along(g.heads, [g.batch, g.q_len, g.kv_len])
        return pairs_along(
            g.kv_heads, [g.batch, g.q_len, g.kv_len, g.heads / g.kv_heads, g.head_dim]
        )

    def take(self, rows: Array) -> MeasuredRows:
        return replace(self, data=self.data.take(rows))

    def train_test(
        self, size: int | None, seed: int, by: str = ""
    ) -> tuple[MeasuredRows, MeasuredRows]:
        """Hold out 30 % of the groups: (n, k) of GEMMs, models of experts, "heads" or "lengths" of
        attention. Return ``size`` rows of the other groups at random (None: all), and every row of
        the held-out groups."""
        groups = self.data.groups(by)
        count = int(groups.max()) + 1
        order = np.random.default_rng(seed).permutation(count)
        unseen = np.isin(groups, order[: round(TEST_SHARE * count)])
        train = np.flatnonzero(~unseen)
        if size is not None and size < len(train):
            train = np.sort(np.random.default_rng(seed + 100).choice(train, size, replace=False))
        return self.take(train), self.take(np.flatnonzero(unseen))

    def records(self) -> Records:
        c, columns = self.data.calls, dict[str, Any]()
        dtype, weight = formats_of(self.dtype, self.hw.rates)
        if isinstance(c, AttentionCalls):
            g = c.geometry
            columns = {name: getattr(g, name) for name in SHAPE}
            columns["cold"] = np.broadcast_to(g.warm, len(self.data)) == 0.0
            columns["n"] = 0.0 if g.value_dim is None else g.value_dim
        elif isinstance(c, Products):
            cold = np.isinf(c.copies)
            columns = {name: getattr(c, name) for name in ("m", "n", "k")}
            columns |= {"cold": cold, "copies": np.where(cold, 0.0, c.copies)}
        elif isinstance(c, Layers):
            names = ("m", "n", "k", "experts", "active", "skew")
            columns = {name: getattr(c, name) for name in names}
            columns |= {"cold": ~c.warm, "copies": c.warm, "role": PART_ROLES[c.part]}
        if not isinstance(c, AttentionCalls):
            columns["weight_dtype"] = weight
        columns |= {"operator": c.operator, "dtype": dtype, "seconds": self.data.seconds}
        return Records.from_columns([Source("")], **columns)

    def fit(self, *, seed: int = 0, prior: Section | None = None, by: str = "") -> Section:
        """Return the section fitted to all rows; ``prior`` applies to GEMMs, groups to fold ``by``
        to attention."""
        if isinstance(self.data, GemmFit):
            return fit_gemm(self.data, self.hw, dtype=self.dtype, seed=seed, prior=prior).section
        if isinstance(self.data, AttentionFit):
            fold_by = (by,) if by else GROUPINGS
            return fit_attention(
                self.data, self.hw.architecture, seed=seed, fold_by=fold_by
            ).section
        return fit_section(self.data, seed=seed).section

    def profile(self, section: Section, same_stack: bool = True) -> HardwareProfile:
        """Return the device with one section, for use on the stack of the fit or (``same_stack``
        false) another."""
        return replace(
            self.hw.calibrated({(self.data.calls.operator, self.dtype): section}),
            same_stack=same_stack,
        )

    def timed(self, seconds: FloatArray, pairs: IndexArray) -> ScoredRows:
        c = self.data.calls
        return ScoredRows(
            self.data.seconds, seconds, m=c.m if isinstance(c, Products) else None, pairs=pairs
        )

    def predictions(
        self, hw: HardwareProfile, pairs: IndexArray, ratios: bool = False
    ) -> ScoredRows:
        """Return the rows next to times by a profile, under the rows' protocol (warm or cold
        weights); ``ratios``: with intervals of the ratios of pairs."""
        found, half = predict(self.records(), hw), None
        if ratios and len(pairs) and found.uncertainty is not None:
            smaller, larger = (found.uncertainty.take(side) for side in pairs.T)
            half = ratio_half(smaller, larger, LEVEL)
        time = found.time
        return replace(
            self.timed(time.seconds, pairs), lower=time.lower, upper=time.upper, half_width=half
        )


def row(method: str, seed: int, scores: Mapping[str, float], rows: int = 0, **names: str) -> Row:
    """Return the scores of one method on one split of a table; ``rows`` are those of the fit (0:
    all)."""
    return {"method": method, "rows": rows, "seed": seed, **names, **scores}


def evaluate(section: Section, table: MeasuredRows, by: str = "") -> dict[str, float]:
    """Return the scores of a section on rows of its stack."""
    ratios = isinstance(table.data.calls, Layers)
    return score(table.predictions(table.profile(section), table.pairs(by), ratios))


def evaluate_table(
    table: MeasuredRows, size: int | None, seed: int, by: str = "", prior: Section | None = None
) -> Row:
    """Fit to ``size`` rows (None: all) of the training groups and evaluate on every row of the test
    groups."""
    train, test = table.train_test(size, seed, by)
    section = train.fit(seed=seed, prior=prior, by=by)
    return row("prunesim + prior" if prior else "prunesim", seed, evaluate(section, test, by))


def evaluate_profile(hw: HardwareProfile, table: MeasuredRows, seed: int) -> Row:
    """Evaluate a profile of another stack or GPU on the test groups of a table."""
    rng, unseen = np.random.default_rng(seed + 50), table.train_test(None, seed)[1]
    test = unseen.take(np.sort(rng.permutation(len(unseen.data))[:MOST_ROWS]))
    pairs = test.pairs()
    pairs = pairs[np.sort(rng.permutation(len(pairs))[:MOST_PAIRS])]
    return row("as shipped", seed, score(test.predictions(hw, pairs, ratios=True)))


@dataclass(frozen=True)
class EvidenceSet:
    held_out: str
    # from the seed of the split and the wheel of the tables
    rows: Callable[[int, Path | None], Iterable[Row]]
    # collectives, which are not split by seeds and are not on the page of kernels
    whole: bool = False


def evaluate_sets(
    names: Sequence[str] = (),
    seeds: Sequence[int] = SEEDS,
    wheel: Path | None = None,
    jobs: int = 1,
    progress: Callable[[str], None] = lambda text: None,
) -> list[Row]:
    """Return the scores of sets (default: all): "set", "table", "held_out", "method", "rows" (0:
    all; of a held-out stack: none), "seed", and those of
    :func:`calibration.validation.scoring.score`."""
    for name in names:
        if name not in SETS:
            raise unknown("set", name, SETS)
    if wheel is not None:
        open_wheel(wheel).close()
    parts = [
        (name, seed, wheel)
        for name in names or SETS
        for seed in (seeds[:1] if SETS[name].whole else seeds)
    ]
    out: list[Row] = []
    # spawned: a forked child would inherit the locks of threads that it does not have
    with ProcessPoolExecutor(min(jobs, len(parts)), get_context("spawn")) as pool:
        for done, rows in enumerate(
            (pool.map if jobs > 1 else map)(_evaluate, *zip(*parts, strict=True)), start=1
        ):
            progress(f"{done}/{len(parts)}")
            out += rows
    return out


def _evaluate(name: str, seed: int, wheel: Path | None) -> list[Row]:
    return [{"set": name, "held_out": "", **r} for r in SETS[name].rows(seed, wheel)]


def means(rows: Sequence[Row], table: str = "") -> list[Row]:
    """Return the rows of one table (default: of each table in turn), averaged over seeds."""
    titles = list(dict.fromkeys(r["table"] for r in rows if table in ("", r["table"])))
    own = [r for r in rows if r["table"] in titles]
    out = []
    for group in by_key(own, itemgetter("table", "held_out", "method", "rows")).values():
        shared = [name for name, v in group[0].items() if isinstance(v, float)]
        scores = {
            name: float(np.mean([r[name] for r in group]))
            for name in shared
            if all(name in r for r in group)
        }
        out.append({**group[0], "seeds": len(group), **scores})

    def order(r: Row) -> tuple[int, str, int]:
        size = 0 if r["method"] == "as shipped" else r["rows"] or 10**9
        return titles.index(r["table"]), r["held_out"], size

    return sorted(out, key=order)


# tables of kernels


@dataclass(frozen=True)
class TableChoice:
    measurement: str  # device/operator/stack
    dtype: str = "bf16"
    prior: str = ""  # table of another stack, whose section is the prior of a small fit
    wheel: Path | None = None  # source of a table that does not ship

    @property
    def parts(self) -> tuple[str, str, str]:
        device, operator, stack = self.measurement.split("/")
        return device, operator, stack

    @lru_cache(maxsize=8)  # noqa: B019
    def load(self) -> MeasuredRows:
        records = _records(self.measurement, self.wheel).of_dtype(self.dtype)
        hw, operator = datasheet(SOURCES[self.measurement].hardware), self.parts[1]
        machine = Machine.of(hw, self.dtype)
        if operator == "experts":
            return MeasuredRows(layers_of(records, machine, hw.architecture), hw, self.dtype)
        if operator == "gemm":
            return MeasuredRows(products_of(records, machine), hw, self.dtype)
        return MeasuredRows(calls_of(records, operator, machine).usable(), hw, self.dtype)

    @lru_cache(maxsize=64)  # noqa: B019
    def fitted(self) -> Section:
        return self.load().fit()

    @lru_cache(maxsize=64)  # noqa: B019
    def formats(self) -> frozenset[str]:
        """Return the number formats that are evaluated; for a shipped table, those that it was
        chosen for."""
        found = frozenset(_records(self.measurement, self.wheel).labels().astype(str))
        return found if self.wheel else found & set(provenance(self.measurement)["rows"])


_records = lru_cache(maxsize=4)(read_source)


GEMMS = {name: TableChoice(**choice) for name, choice in DATA["gemms"].items()}
ATTENTION, EXPERTS = ("attention_prefill", "attention_decode"), ("experts",)
EXPERT_FORMATS = ("bf16", "fp8", "fp8_block", "nvfp4")  # weight-only formats have one or two models
# rows of an attention table from which three tenths of its heads or lengths are held out
FEWEST = 40


def _tables(operator: str, wheel: Path | None = None) -> list[TableChoice]:
    """Return the tables of an operator, ordered by device. The wheel has all formats of experts,
    also of a table that ships in part."""
    shipped = list_measurements()
    every = [
        TableChoice(name, wheel=None if name in shipped and operator != "experts" else wheel)
        for name in (shipped if wheel is None else SOURCES)
    ]
    own = [t for t in every if t.parts[1] == operator and t.parts[2] in STACKS]
    return list(chain.from_iterable(by_key(own, lambda table: table.parts[0]).values()))


def stack_pairs(
    wheel: Path | None, operators: Sequence[str]
) -> list[tuple[TableChoice, TableChoice]]:
    """Return pairs of the table of a held-out stack and the table that predicts it, for every
    device and operator with two or more stacks: the default stack among the others. vLLM's tables,
    which lack large GEMMs, predict no stack."""
    tables, out = {t.parts: t for operator in operators for t in _tables(operator, wheel)}, []
    for (device, operator, stack), table in tables.items():
        keys = [(device, operator, s) for s in STACKS if s not in (stack, "vllm")]
        out += [(table, tables[key]) for key in keys if key in tables][:1]
    return out


def _gemm(name: str, seed: int, wheel: Path | None) -> Iterator[Row]:
    table, data = GEMMS[name], GEMMS[name].load()
    yield {**evaluate_table(data, FEW, seed), "table": name, "rows": FEW}
    if table.prior:
        prior = TableChoice(table.prior, table.dtype).fitted()
        yield {**evaluate_table(data, FEW, seed, prior=prior), "table": name, "rows": FEW}
    yield {**evaluate_table(data, None, seed), "table": name}


def _stacks(pairs: Iterable[tuple[TableChoice, TableChoice]], seed: int) -> Iterator[Row]:
    for table, source in pairs:
        device, operator, stack = table.parts
        held_out = f"{device} {stack}" + (f" {table.dtype}" if operator == "experts" else "")
        names = {"table": f"{operator}, held-out stack", "held_out": held_out}
        hw = table.load().profile(source.fitted(), same_stack=False)
        yield {**evaluate_profile(hw, table.load(), seed), **names}


def _attention(operators: Sequence[str], seed: int, wheel: Path | None) -> Iterator[Row]:
    for table, by in (
        (t, by) for operator in operators for t in _tables(operator, wheel) for by in GROUPINGS
    ):
        device, operator, stack = table.parts
        kind, phase = operator.split("_")
        names = {"table": f"{kind} {device}, {stack}", "method": f"{phase}, {by}"}
        data = table.load()
        if len(data.data) >= FEWEST and data.data.groups(by).max() >= 2:
            yield {**evaluate_table(data, None, seed, by), **names}


def _mla(seed: int, wheel: Path | None) -> Iterator[Row]:
    yield from _stacks(stack_pairs(wheel, LATENT), seed)
    yield from _attention(LATENT, seed, wheel)


def _experts(seed: int, wheel: Path | None) -> Iterator[Row]:
    for table in _tables("experts", wheel):
        device, _, stack = table.parts
        title = f"experts {device}, held-out models"
        for dtype in (d for d in EXPERT_FORMATS if d in table.formats()):
            names = {"table": title, "method": f"{stack} {dtype}"}
            yield {**evaluate_table(replace(table, dtype=dtype).load(), None, seed), **names}
    pairs = stack_pairs(wheel, EXPERTS)
    both = [(a, b, d) for a, b in pairs for d in EXPERT_FORMATS if d in a.formats() & b.formats()]
    yield from _stacks([(replace(a, dtype=d), replace(b, dtype=d)) for a, b, d in both], seed)


def _gpus(seed: int, wheel: Path | None) -> Iterator[Row]:
    """Yield the scores of every shipped table as on a GPU without a calibration: by its datasheet,
    and by the fits of the first other GPU of its architecture that has this operator and format,
    else by defaults. Defaults of an architecture come from its tables: they show the error of
    constants without a residual."""
    known = [load_hardware(name) for name in dict.fromkeys(c.hardware for c in SOURCES.values())]
    operators = ("gemm", *ATTENTION, *LATENT, *EXPERTS)
    for every in chain.from_iterable(map(_tables, operators)):
        device, operator, stack = every.parts
        # narrow caches have the section of their arithmetic
        for dtype in sorted(every.formats() - {"fp8_wo"}):
            table = replace(every, dtype=dtype).load()
            if table.data.groups().max() < 2:
                continue
            origin = next(
                (
                    hw
                    for hw in known
                    if hw.architecture == table.hw.architecture
                    and hw.name != table.hw.name
                    and (operator, dtype) in hw.sections
                ),
                None,
            )
            hw = inheriting(table.hw, origin) if origin else table.hw
            held_out = f"{device} {stack} {dtype}: {origin.name if origin else 'defaults'}"
            title = f"{operator}, GPU without a calibration"
            names = {"table": title, "held_out": held_out}
            yield {**evaluate_profile(hw.serving((stack, *STACKS)), table, seed), **names}


# collectives

# smaller published rows are excluded: a call's overhead of 40 us is over a third of their time
LEAST_BYTES = 1.6e7


def _links(seed: int, wheel: Path | None) -> Iterator[Row]:
    """Yield the scores of systems with tables, of a machine without peer access, and of two systems
    whose rows another laboratory published. The defaults predict the last three: no default was set
    by the published rows."""
    staged = []
    for system, (name, *others) in DATA["links"].items():
        hw, rows = load_hardware(name), []
        tables = [f"{system}/collective/{s}" for s in ("sglang", "trtllm", "vllm", "nccl")]
        for table in (table for table in tables if table in list_measurements()):
            r = load_measurements(table)
            # engines run an all-reduce of their own instead of NCCL's
            if table.endswith("nccl"):
                r = r.select(r.role != ROLES.index("all_reduce"))
            if table in STAGED:
                staged.append(r.select(r.batch > 2))
                r = r.select(r.batch <= 2)
            rows.append(r)
        hw = hw.over(hw.link.name if hw.link else "")
        yield _link(system, hw, rows, {("collective", "*"): _mean_section(others)})
    yield _link("l40s, host memory", load_hardware("l40s").over("pcie-host"), staged, {})
    for system in ("a100_dgx", "a100_pairwise_nvlink"):
        some = [
            r
            for r in published("collectives")
            if r["system"] == system and float(r["bytes"]) >= LEAST_BYTES
        ]
        columns = {"n": "bytes", "batch": "devices", "seconds": "seconds"}
        values: dict[str, Any] = {
            ours: np.array([float(r[name]) for r in some]) for ours, name in columns.items()
        }
        values |= {"operator": "collective", "role": ROLES.index("all_reduce")}
        records = Records.from_columns([Source("")], **values)
        yield _link(system, load_hardware(some[0]["hardware"]).over(some[0]["link"]), [records], {})


def _link(
    system: str, hw: HardwareProfile, rows: Sequence[Records], sections: Mapping[Any, Section]
) -> Row:
    """Return the scores of rows, predicted with some sections instead of those of the profile."""
    hw = replace(hw, sections={}, stacks={}, stack="", stacks_of="")
    times = [predict(r, hw.calibrated(sections, "held out") if sections else hw).time for r in rows]
    predicted = [
        np.concatenate([getattr(t, part) for t in times]) for part in ("seconds", "lower", "upper")
    ]
    measured = np.concatenate([r.seconds for r in rows])
    scores = score(ScoredRows(measured, *predicted))
    return row(system, 0, scores, len(measured), table="collectives of a held-out system")


def _mean_section(names: Sequence[str]) -> Section:
    """Return the mean of the fitted constants of some profiles over all stacks, geometric where all
    are above 0."""
    sections = [
        stack.get(("collective", "*"))
        for name in names
        for stack in load_hardware(name).stacks.values()
    ]
    found, out = [s for s in sections if s is not None and s.status == "calibrated"], {}
    for key in COLLECTIVE_CONSTANTS:
        values = np.array([section[key] for section in found])
        one = float(np.exp(np.log(values).mean()) if values.min() > 0 else values.mean())
        out[key] = Fitted(float(np.median(values)) if key in ("own_devices", "own_bytes") else one)
    return Section(out)


SETS: Mapping[str, EvidenceSet] = {
    **{name: EvidenceSet("(n, k)", partial(_gemm, name)) for name in GEMMS},
    "stacks": EvidenceSet(
        "a software stack", lambda seed, _: _stacks(stack_pairs(None, ("gemm", *ATTENTION)), seed)
    ),
    "attention": EvidenceSet("heads, lengths", lambda seed, _: _attention(ATTENTION, seed, None)),
    "mla": EvidenceSet("a software stack; heads, lengths", _mla),
    "experts": EvidenceSet("models; a software stack", _experts),
    "gpus": EvidenceSet("a GPU", _gpus),
    "collectives": EvidenceSet("a system", _links, whole=True),
}
