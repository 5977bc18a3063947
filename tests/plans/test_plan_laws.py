"""Laws of costs and plans, over random models, devices, engines and requests.

Dense costs add up to the pass; a wider variant costs at least as much as a narrower one; a written
plan is predicted as the search predicted it; more speed never costs less score; more variants never
cost more score, fewer targets neither.

``PRUNESIM_LAWS=1000 pytest tests/plans/test_plan_laws.py`` for a thousand inputs of each law.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

import simulator
from simulator.errors import InputError
from simulator.models.model import Model
from simulator.models.sublayers import Experts
from simulator.plans.costs import costs, quantities
from simulator.plans.library import Library, generated_library
from simulator.plans.search import Plan, search
from simulator.plans.solve import Targets
from simulator.plans.write import check_plan, plan_text
from simulator.prediction.compare import request_results
from simulator.prediction.prunings import Pruning

MANY = int(os.environ.get("PRUNESIM_LAWS", "8"))
law = settings(
    max_examples=MANY, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck)
)
LAYERS = 4  # layers of a shipped model: more of them repeat the same arithmetic

STEPS = {"attention": 0.5, "mlp": 0.05, "experts": 0.25}
"""Share by which a narrower variant may cost more: another kernel (grouped queries in Transformers,
which copies keys and values: 35 %; routed experts of few tokens: 9 %), or tiles that fill the
device less well."""

MODELS = (
    *(
        "llama-3.2-1b",
        "llama-3.1-8b",
        "llama-2-7b",
        "smollm2-135m",
        "qwen2.5-7b",
        "gemma-2-9b",
        "gemma-3-12b",
    ),
    *(
        "mixtral-8x7b",
        "qwen3-30b-a3b",
        "gpt-oss-20b",
        "deepseek-v2-lite",
        "qwen3-next-80b-a3b",
        "nemotron-super-49b",
    ),
)
HARDWARE = ("h100", "a100", "h200", "b200", "l40s", "rtx_4090", "rtx_3090", "h20", "mi300x")
ENGINES = ("vllm", "hf", "trtllm", "sglang", "compile", "reference")


@dataclass(frozen=True)
class Case:
    """What is priced or searched."""

    model: Model
    hardware: str
    request: dict[str, Any]

    def search(self, targets: Targets, library: Library) -> Plan | None:
        """The plan; None where none meets the targets."""
        try:
            return search(self.model, self.hardware, targets, library, **self.request)
        except InputError as error:
            # else there is no such arithmetic or kernel
            assume("no plan of these variants" in str(error))
            return None


@st.composite
def cases(draw: st.DrawFn) -> Case:
    model = simulator.load_model(draw(st.sampled_from(MODELS)))
    request = {
        "engine": draw(st.sampled_from(ENGINES)),
        "phase": draw(st.sampled_from(("prefill", "decode", "generate", "serve"))),
        "batch": draw(st.sampled_from((1, 3, 8, 64, 256))),
        "seq": draw(st.sampled_from((1, 100, 2048, 16384))),
    }
    short = model.with_layers(model.layers[:LAYERS])
    return Case(short, draw(st.sampled_from(HARDWARE)), request)


@st.composite
def libraries(draw: st.DrawFn, model: Model) -> Library:
    """Some of the usual variants of a model, with random scores that rise with the removed
    parameters."""
    whole = generated_library(model)
    random = np.random.default_rng(draw(st.integers(0, 1000)))
    keep = []
    for own in whole.layers:
        many = draw(st.integers(1, 5))
        keep.append([0, *sorted(random.permutation(np.arange(1, len(own)))[:many].tolist())])
    library = whole.take(keep)
    scores = []
    for own, dense in zip(library.layers, model.layers):
        removed = [1.0 - model.parameters_of(one) / model.parameters_of(dense) for one in own]
        scores.append(np.array([0.0, *(random.lognormal(0.0, 1.0) * r for r in removed[1:])]))
    return replace(library, values={"kl_div": tuple(scores)})


@law
@given(case=cases())
def test_dense_costs_add_up_and_narrower_variants_cost_no_more(case: Case) -> None:
    try:
        found = costs(case.model, case.hardware, generated_library(case.model), **case.request)
    except InputError:  # no such arithmetic or kernels there
        assume(False)
    c = found.columns
    assert all(
        np.isfinite(c[name]).all() for name in ("seconds", "lower", "upper", "weights_bytes")
    )
    whole = quantities([case.model], found.settings[0])["pruned_s"][0]
    dense = c["variant"] == "dense"
    assert c["seconds"][dense].sum() == pytest.approx(whole, rel=1e-9)
    assert c["parameters"][dense].sum() == case.model.parameters
    np.testing.assert_allclose(c["prefill_s"] + c["decode_s"], c["seconds"], rtol=1e-9, atol=1e-15)
    assert (c["lower"] <= c["seconds"] + 1e-15).all()
    assert (c["seconds"] <= c["upper"] + 1e-15).all()
    for layer in range(len(case.model.layers)):
        for sublayer in ("attention", "mlp"):
            # from wide to narrow
            own = np.flatnonzero((c["layer"] == layer) & (c["sublayer"] == sublayer))
            step = STEPS[
                "experts"
                if isinstance(case.model.layers[layer].of(sublayer), Experts)
                else sublayer
            ]
            took = c["seconds"][own]
            most = np.minimum.accumulate(took)[:-1]
            assert (took[1:] <= most * (1.0 + step) + 2e-6).all(), (
                case,
                layer,
                c["variant"][own],
                took,
            )


@law
@given(data=st.data(), case=cases())
def test_more_speed_costs_more_score_and_more_variants_less(
    data: st.DataObject, case: Case
) -> None:
    """Up to the gap, where costs do not depend on the plan."""
    library = data.draw(libraries(case.model))
    t1, t2 = sorted(
        data.draw(
            st.lists(st.sampled_from((1.02, 1.1, 1.2, 1.4, 1.7, 2.5)), min_size=2, max_size=2)
        )
    )
    first, second = plans = [case.search(Targets(speedup=t), library) for t in (t1, t2)]
    for plan, target in zip(plans, (t1, t2)):
        if plan is not None:
            assert plan.results[0].speedup >= target * (1.0 - 1e-9)
            assert plan.score >= -1e-12
    if second is None:
        return
    assert first is not None, "a plan reaches more speed but none reaches less"
    fewer = library.take([range(max(1, len(own) - 1)) for own in library.layers])
    more = Targets(speedup=t2, parameters=0.98 * second.pruned.parameters)
    pairs = [
        (first, second),
        (second, case.search(Targets(speedup=t2), fewer)),
        (second, case.search(more, library)),
    ]
    for free, bound in pairs:
        if bound is not None:
            assert free.score <= bound.score * (1.0 + 1e-6) + free.gap * abs(free.score) + 1e-9, (
                case,
                t1,
                t2,
            )


@law
@given(data=st.data(), case=cases())
def test_a_written_plan_is_predicted_as_the_search_did(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject, case: Case
) -> None:
    plan = case.search(Targets(speedup=1.1), data.draw(libraries(case.model)))
    assume(plan is not None)
    file: Path = tmp_path_factory.mktemp("plan") / "plan.yaml"
    try:
        file.write_text(text := plan_text(plan.dense, plan.pruned))
        check_plan(text, plan.dense, plan.pruned)
    except InputError:  # then it is not written
        assume(False)
    at, own = plan.settings[0], plan.results[0]
    (found,) = request_results(
        [replace(at.request, model=plan.dense)], [Pruning.read(str(file))], [at.hw]
    )
    values = [(r.pruned_s, r.speedup, r.lower, r.upper) for r in (found, own)]
    assert values[0] == pytest.approx(values[1], rel=1e-9), (case, text)
