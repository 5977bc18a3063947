"""Laws of costs and plans, over random models, devices, engines and requests.

Dense costs add up to the pass; a wider variant costs at least as much as a narrower one; a written plan is predicted as
the search predicted it; more speed never costs less score; more variants never cost more score, fewer targets neither.

``PRUNESIM_LAWS=1000 pytest -m slow tests/plans/test_plan_laws.py`` for a thousand inputs of each law.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from simulator.plans.plan import check_plan, plan_text
from simulator.plans.prices import quantities

import simulator
from simulator.errors import InputError
from simulator.models.config import ModelConfig
from simulator.plans.costs import Costs, costs
from simulator.plans.library import Library, generated_library
from simulator.plans.search import Plan, search
from simulator.plans.solve import Targets
from simulator.prediction.compare import scenario_results
from simulator.prediction.prunings import Pruning

FEW, MANY = 8, int(os.environ.get("PRUNESIM_LAWS", "40"))
LAYERS = 4
"""Layers that a shipped model keeps: more of them repeat the same arithmetic."""

STEPS = {"attention": 0.5, "mlp": 0.05}
"""Share by which a narrower variant may cost more: another kernel (grouped queries in Transformers, which copies
keys and values: 35 %), or tiles that fill the device less well."""

EXPERTS_STEP = 0.25
"""The same for fewer routed experts: few tokens use as many of them, in other kernels (SGLang on an H100: 9 %)."""

MODELS = (
    *("llama-3.2-1b", "llama-3.1-8b", "llama-2-7b", "smollm2-135m", "qwen2.5-7b", "gemma-2-9b", "gemma-3-12b"),
    *("mixtral-8x7b", "qwen3-30b-a3b", "gpt-oss-20b", "deepseek-v2-lite", "qwen3-next-80b-a3b", "nemotron-super-49b"),
)
HARDWARE = ("h100", "a100", "h200", "b200", "l40s", "rtx_4090", "rtx_3090", "h20", "mi300x")
ENGINES = ("vllm", "hf", "trtllm", "sglang", "compile", "reference")


@dataclass(frozen=True)
class Case:
    """What is priced or searched."""

    model: ModelConfig
    hardware: str
    engine: str
    phase: str
    batch: int
    seq: int

    def costs(self, library: Library) -> Costs:
        """Costs of the variants of a library."""
        return costs(
            self.model, self.hardware, library, engine=self.engine, phase=self.phase, batch=self.batch, seq=self.seq
        )

    def search(self, targets: Targets, library: Library) -> Plan | None:
        """The plan; None where none meets the targets."""
        try:
            return search(
                *(self.model, self.hardware, targets, library),
                **{"engine": self.engine, "phase": self.phase, "batch": self.batch, "seq": self.seq},
            )
        except InputError as error:
            if "no plan of these variants" not in str(error):
                raise
            return None


def short(name: str) -> ModelConfig:
    """A shipped model with its first layers."""
    model = simulator.load_model(name)
    blocks = model.blocks[:LAYERS] if model.blocks else model.blocks
    return replace(model, layers=LAYERS, blocks=blocks, windows=model.windows[:LAYERS])


@st.composite
def cases(draw: st.DrawFn) -> Case:
    return Case(
        short(draw(st.sampled_from(MODELS))),
        draw(st.sampled_from(HARDWARE)),
        draw(st.sampled_from(ENGINES)),
        draw(st.sampled_from(("prefill", "decode", "generate", "serve"))),
        draw(st.sampled_from((1, 3, 8, 64, 256))),
        draw(st.sampled_from((1, 100, 2048, 16384))),
    )


@st.composite
def libraries(draw: st.DrawFn, model: ModelConfig) -> Library:
    """Some of the usual variants of a model, with scores that rise with what is removed, or at random."""
    whole = generated_library(model)
    random = np.random.default_rng(draw(st.integers(0, 1000)))
    keep = []
    for own in whole.layers:
        many = draw(st.integers(1, 5))
        keep.append([0, *sorted(random.permutation(np.arange(1, len(own)))[:many].tolist())])
    library = whole.take(keep)
    scores = []
    for own, dense in zip(library.layers, model.layout):
        removed = [1.0 - model.block_parameters(block) / model.block_parameters(dense) for block in own]
        scores.append(np.array([0.0, *(random.lognormal(0.0, 1.0) * r for r in removed[1:])]))
    return replace(library, values={"kl_div": tuple(scores)})


def checked(law: Callable[..., None], count: int) -> None:
    """Check a law for some random inputs, always the same ones."""
    health = settings(max_examples=count, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
    health(given(st.data())(law))()


BY_THE_DOZEN = pytest.param(MANY, marks=pytest.mark.slow, id="many")


@pytest.mark.parametrize("count", [FEW, BY_THE_DOZEN])
def test_dense_costs_add_up_and_narrower_variants_cost_no_more(count: int) -> None:
    def law(data: st.DataObject) -> None:
        case = data.draw(cases())
        try:
            found = case.costs(generated_library(case.model))
        except InputError:  # no such arithmetic or kernels there
            assume(False)
        c = found.columns
        assert all(np.isfinite(c[name]).all() for name in ("seconds", "lower", "upper", "weights_bytes"))
        whole = quantities([case.model], found.settings[0])["pruned_s"][0]
        dense = c["variant"] == "dense"
        assert c["seconds"][dense].sum() == pytest.approx(whole, rel=1e-9)
        assert (c["lower"] <= c["seconds"] + 1e-15).all()
        assert (c["seconds"] <= c["upper"] + 1e-15).all()
        for layer in range(case.model.layers):
            for sublayer, usual in STEPS.items():
                own = np.flatnonzero((c["layer"] == layer) & (c["sublayer"] == sublayer))  # from wide to narrow
                step = EXPERTS_STEP if sublayer == "mlp" and case.model.layout[layer].experts else usual
                took = c["seconds"][own]
                most = np.minimum.accumulate(took)[:-1]
                assert (took[1:] <= most * (1.0 + step) + 2e-6).all(), (case, layer, c["variant"][own], took)

    checked(law, count)


@pytest.mark.parametrize("count", [FEW, BY_THE_DOZEN])
def test_more_speed_costs_more_score_and_more_variants_less(count: int) -> None:
    """Up to the gap, where costs do not depend on the plan."""

    def law(data: st.DataObject) -> None:
        case = data.draw(cases())
        library = data.draw(libraries(case.model))
        t1, t2 = sorted(data.draw(st.lists(st.sampled_from((1.02, 1.1, 1.2, 1.4, 1.7, 2.5)), min_size=2, max_size=2)))
        try:
            plans = [case.search(Targets(speedup=t), library) for t in (t1, t2)]
        except InputError:
            assume(False)
        first, second = plans
        for plan, target in zip(plans, (t1, t2)):
            if plan is not None:
                assert plan.results[0].speedup >= target * (1.0 - 1e-9)
                assert plan.score >= -1e-12
        if second is None:
            return
        assert first is not None, "what reaches more speed reaches less"
        never_worse(first, second, f"{case} {t1} {t2}")
        fewer = library.take([range(max(1, len(own) - 1)) for own in library.layers])
        if (less := case.search(Targets(speedup=t2), fewer)) is not None:
            never_worse(second, less, f"{case} {t2} fewer variants")
        more = Targets(speedup=t2, parameters=0.98 * second.pruned.parameters)
        if (both := case.search(more, library)) is not None:
            never_worse(second, both, f"{case} {t2} and parameters")

    checked(law, count)


def never_worse(a: Plan, b: Plan, where: str) -> None:
    """The score of the less constrained plan ``a`` is at most that of ``b``."""
    assert a.score <= b.score * (1.0 + 1e-6) + a.gap * abs(a.score) + 1e-9, where


@pytest.mark.parametrize("count", [FEW, BY_THE_DOZEN])
def test_a_written_plan_is_predicted_as_the_search_did(count: int, tmp_path: Path) -> None:
    def law(data: st.DataObject) -> None:
        case = data.draw(cases())
        library = data.draw(libraries(case.model))
        try:
            plan = case.search(Targets(speedup=1.1), library)
        except InputError:
            assume(False)
        assume(plan is not None)
        try:
            text = plan_text(plan.dense, plan.pruned)
            (tmp_path / "plan.yaml").write_text(text)
            check_plan(text, plan.dense, plan.pruned)
        except InputError:  # then it is not written
            assume(False)
        at, own = plan.settings[0], plan.results[0]
        again = Pruning.read(str(tmp_path / "plan.yaml"))
        (found,) = scenario_results(replace(at.scenario, model=plan.dense), [again], [at.hw])
        assert found.pruned_s == pytest.approx(own.pruned_s, rel=1e-9), (case, text)
        assert found.speedup == pytest.approx(own.speedup, rel=1e-9)
        assert (found.lower, found.upper) == pytest.approx((own.lower, own.upper), rel=1e-9)

    checked(law, count)
