"""Costs and searches: sums, targets, what other rules choose, and bad input."""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from pathlib import Path

import numpy as np
import pytest
from simulator.plans.plan import check_plan, plan_text
from simulator.plans.prices import PricedRequest, Probes, planned, quantities

import simulator
from simulator.errors import InputError
from simulator.hardware.library import load_hardware
from simulator.models.library import load_model
from simulator.plans.costs import costs
from simulator.plans.library import generated_library, read_library
from simulator.plans.search import search
from simulator.plans.solve import Targets
from simulator.prediction.scenario import Scenario

MODEL = load_model("llama-3.2-1b")  # 16 layers


def scores_file(folder: Path, seed: int = 0) -> Path:
    """Scores of eight variants of each layer that fall with the width, at random."""
    random = np.random.default_rng(seed)
    lines = ["layer,attention,mlp,kl_div"]
    for layer in range(MODEL.layers):
        rise = np.sort(random.random(4)) * random.uniform(0.5, 2.0)
        lost = random.uniform(0.2, 1.5)
        for i, mlp in enumerate(("dense", "6144", "4096", "none")):
            for attention in ("dense", "none"):
                value = (rise[i] if i else 0.0) + (lost if attention == "none" else 0.0)
                lines.append(f"{layer},{attention},{mlp},{value:.6f}")
    file = folder / "scores.csv"
    file.write_text("\n".join(lines) + "\n")
    return file


# -- costs -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("engine", ["vllm", "hf", "trtllm"])
@pytest.mark.parametrize("phase", ["prefill", "decode", "generate", "serve"])
def test_costs_of_dense_layers_add_up_to_the_pass(engine: str, phase: str) -> None:
    found = costs(MODEL, "a100", engine=engine, phase=phase, batch=4, seq=512)
    columns = found.columns
    dense = columns["variant"] == "dense"
    scenario = Scenario(model=MODEL, phase=phase, shapes=((4, 512),), engine=engine).on(load_hardware("a100"))
    whole = simulator.workload_time(scenario.workloads[0], "a100").total_s
    assert columns["seconds"][dense].sum() == pytest.approx(whole, rel=1e-9)
    assert columns["parameters"][dense].sum() == MODEL.parameters
    assert (columns["lower"] <= columns["seconds"]).all()
    assert (columns["seconds"] <= columns["upper"]).all()
    apart = columns["prefill_s"] + columns["decode_s"]
    np.testing.assert_allclose(apart, columns["seconds"], rtol=1e-9, atol=1e-15)


def test_narrower_variants_cost_no_more() -> None:
    columns = costs(MODEL, "h100", phase="decode", batch=8).columns
    first = (columns["layer"] == 0) & (columns["sublayer"] == "mlp")
    seconds = columns["seconds"][first]  # from dense to none
    assert (np.diff(seconds) < 1e-12).all()
    assert seconds[-1] == 0.0


def test_the_cost_of_a_cache_is_that_of_its_heads() -> None:
    columns = costs(MODEL, "h100", phase="decode", batch=8, seq=1000).columns
    own = (columns["layer"] == 3) & (columns["sublayer"] == "attention")
    cache = dict(zip(columns["variant"][own].tolist(), columns["cache_bytes"][own].tolist()))
    assert cache["dense"] == 2 * cache["kv=4"] == 8 * 1001 * 2 * MODEL.kv_width * 2


def test_intervals_of_a_host_bound_engine_are_wider() -> None:
    found = {e: costs(MODEL, "h100", engine=e, phase="decode").columns for e in ("trtllm", "hf")}
    width = {}
    for engine, columns in found.items():
        own = (columns["layer"] == 0) & (columns["variant"] == "dense")
        width[engine] = ((columns["upper"] - columns["lower"])[own] / columns["seconds"][own]).mean()
    assert width["hf"] > 2 * width["trtllm"]


@pytest.mark.parametrize("engine", ["vllm", "hf"])
def test_prices_add_up_to_a_plan_to_first_order(engine: str) -> None:
    at = PricedRequest(Scenario(phase="decode", shapes=((64, 1024),), engine=engine), load_hardware("a100"))
    library = generated_library(MODEL)
    probes = Probes.of(library, MODEL.layout)
    values = quantities(probes.models, at)["pruned_s"]
    prices = probes.prices(values)
    random = np.random.default_rng(3)
    choice = [int(random.integers(0, 3)) for _ in library.layers]
    added = values[0] + sum(own[i] - own[0] for own, i in zip(prices, choice))
    plan = planned(MODEL, [own[i] for own, i in zip(library.layers, choice)])
    assert quantities([MODEL, plan], at)["pruned_s"][1] == pytest.approx(added, rel=1e-9 if engine == "vllm" else 0.05)


# -- searches ----------------------------------------------------------------------------------------------------------


def test_the_plan_meets_the_target_and_no_single_change_is_better(tmp_path: Path) -> None:
    file = scores_file(tmp_path)
    plan = search(MODEL, "h100", 1.5, file, batch=8)
    assert plan.results[0].speedup >= 1.5
    assert plan.gap == 0.0
    assert plan.score == pytest.approx(sum(row.score for row in plan.layers))
    library, at = (
        read_library(file, MODEL),
        PricedRequest(Scenario(phase="decode", shapes=((8, 2048),)), load_hardware("h100")),
    )
    blocks = list(plan.pruned.layout)
    for layer, own in enumerate(library.layers):
        for block, score in zip(own, library.values["kl_div"][layer]):
            if score < plan.layers[layer].score - 1e-9:
                other = planned(MODEL, [*blocks[:layer], block, *blocks[layer + 1 :]])
                assert quantities([MODEL, other], at)["speedup"][1] < 1.5


def test_the_plan_equals_brute_force_over_predicted_models(tmp_path: Path) -> None:
    choices = tmp_path / "few.csv"
    random = np.random.default_rng(7)
    rows = ["layer,attention,mlp,kl_div"]
    for layer in range(16):
        variants = [("dense", "dense", 0.0)]
        if layer in (2, 5, 8, 11):
            variants += [("none", "dense", random.random()), ("dense", "4096", random.random())]
            variants += [("none", "none", 1.0 + random.random())]
        rows += [f"{layer},{a},{m},{s:.6f}" for a, m, s in variants]
    choices.write_text("\n".join(rows) + "\n")
    library = read_library(choices, MODEL)
    settings = [
        PricedRequest(Scenario(phase="decode", shapes=((8, 2048),), engine=e), load_hardware(h))
        for e, h in (("vllm", "h100"), ("trtllm", "a100"))
    ]
    free = [i for i, own in enumerate(library.layers) if len(own) > 1]
    combinations = list(product(*(range(len(library.layers[i])) for i in free)))
    plans, scores = [], []
    for chosen in combinations:
        pick = dict(zip(free, chosen))
        plans.append(planned(MODEL, [own[pick.get(i, 0)] for i, own in enumerate(library.layers)]))
        scores.append(sum(library.values["kl_div"][i][pick[i]] for i in free))
    found = [quantities([MODEL, *plans], at) for at in settings]
    fast = np.all([own["speedup"][1:] >= 1.08 for own in found], axis=0)
    small = found[0]["parameters"][1:] <= 1.16e9
    assert 0 < (fast & small).sum() < len(plans)
    best = np.array(scores)[fast & small].min()
    plan = search(MODEL, "h100", Targets(speedup=1.08, parameters=1.16e9), choices, batch=8)
    alone = np.array(scores)[(found[0]["speedup"][1:] >= 1.08) & small].min()
    assert plan.score == pytest.approx(alone)
    both = search(MODEL, ["h100", "a100"], Targets(speedup=1.05), choices, engine=["vllm", "trtllm"], batch=8)
    assert len(both.results) == 4
    assert all(r.speedup >= 1.05 for r in both.results)
    assert best >= alone - 1e-12


def test_confidence_makes_plans_faster(tmp_path: Path) -> None:
    file = scores_file(tmp_path)
    even, sure = (search(MODEL, "h100", Targets(speedup=1.4, confidence=p), file, batch=8) for p in (0.5, 0.9))
    assert sure.results[0].speedup > even.results[0].speedup
    assert sure.score > even.score
    assert sure.targets[0].probability >= 0.899
    assert 0.5 <= even.targets[0].probability < 0.9


def test_several_targets_hold_in_every_setting(tmp_path: Path) -> None:
    file = scores_file(tmp_path)
    targets = Targets(tokens_per_s=9000.0, memory_bytes=5.0e9, parameters=1.05e9, tpot_s=0.0035)
    plan = search(MODEL, ["h100", "a100"], targets, file, batch=[16, 32], seq=1024)
    assert len(plan.results) == 4
    assert len(plan.targets) == 16
    for row in plan.targets:
        better = row.reached >= row.wanted if row.target == "tokens_per_s" else row.reached <= row.wanted * (1 + 1e-9)
        assert better, row


def test_time_to_first_token_is_a_target_of_generate(tmp_path: Path) -> None:
    file = scores_file(tmp_path)
    dense = search(MODEL, "a100", Targets(ttft_s=10.0), file, phase="generate", seq=4096)
    assert all((row.attention, row.mlp) == ("dense", "dense") for row in dense.layers)
    wanted = 0.8 * dense.results[0].ttft_s
    plan = search(MODEL, "a100", Targets(ttft_s=wanted), file, phase="generate", seq=4096)
    assert plan.results[0].ttft_s <= wanted
    with pytest.raises(InputError, match="TTFT: decode has none"):
        search(MODEL, "a100", Targets(ttft_s=1.0), file, phase="decode")


def test_uniform_plans_have_one_shape(tmp_path: Path) -> None:
    file = scores_file(tmp_path)
    free, one = (search(MODEL, "h100", 1.5, file, batch=8, uniform=u) for u in (False, True))
    shapes = {(row.attention, row.mlp) for row in one.layers} - {("none", "none")}
    assert len(shapes) == 1
    assert one.results[0].speedup >= 1.5
    assert one.score >= free.score


def test_layers_of_a_group_share_a_variant(tmp_path: Path) -> None:
    plan = search(MODEL, "h100", 1.4, scores_file(tmp_path), batch=8, groups=4)
    texts = [(row.attention, row.mlp) for row in plan.layers]
    assert all(len(set(texts[i : i + 4])) == 1 for i in range(0, 16, 4))
    assert len(set(texts)) > 1


def test_devices_exclude_what_they_cannot_share(tmp_path: Path) -> None:
    file = tmp_path / "scores.csv"
    file.write_text("layer,mlp,kl_div\nall,dense,0\nall,4098,0.1\nall,4096,0.2\nall,none,2\n")
    plan = search(MODEL, "h100", 1.2, file, batch=8, scenario=Scenario(devices=4))
    assert "4098" not in {row.mlp for row in plan.layers}
    assert "16 variants are excluded" in plan.notes[0]


def test_other_rules_choose_worse_plans(tmp_path: Path) -> None:
    plan = search(MODEL, "h100", 1.5, scores_file(tmp_path), batch=8)
    for other in plan.alternatives:
        if other.meets:
            assert other.point.score >= plan.score - 1e-9
        else:
            assert other.point.speedup < 1.5
    assert {(a.chosen_by, a.budget) for a in plan.alternatives} >= {("parameters", "same"), ("FLOPs", "targets")}


def test_the_frontier_rises_in_score_and_speed(tmp_path: Path) -> None:
    plan = search(MODEL, "h100", 1.5, scores_file(tmp_path), batch=8)
    scores, times = ([getattr(p, name) for p in plan.frontier] for name in ("score", "pruned_s"))
    assert scores == sorted(scores)
    assert times == sorted(times, reverse=True)
    assert [p.chosen for p in plan.frontier].count(True) == 1
    assert scores[0] == 0.0


def test_equal_searches_are_equal(tmp_path: Path) -> None:
    file = scores_file(tmp_path)
    first, second = (search(MODEL, "h100", 1.5, file, batch=8).to_dict() for _ in range(2))
    assert first == second


def test_a_higher_metric_can_be_better(tmp_path: Path) -> None:
    lines = scores_file(tmp_path).read_text().splitlines()
    rows = [line.rsplit(",", 1) for line in lines[1:]]
    up = tmp_path / "accuracy.csv"
    up.write_text("\n".join([lines[0].replace("kl_div", "accuracy"), *(f"{a},{1 - float(s)}" for a, s in rows)]))
    best = search(MODEL, "h100", 1.5, up, batch=8, maximise=True)
    assert best.score == pytest.approx(search(MODEL, "h100", 1.5, tmp_path / "scores.csv", batch=8).score, abs=1e-4)
    assert "--maximise" in " ".join(search(MODEL, "h100", 1.5, up, batch=8).notes)


def test_unreachable_targets_name_the_nearest_plan(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"the nearest reaches speedup [\d.]+x of 100x on h100_sxm in vllm") as error:
        search(MODEL, "h100", 100.0, scores_file(tmp_path), batch=8)
    assert "\n" not in str(error.value)


def test_published_depth_losses_are_the_scores_of_last_resort() -> None:
    plan = search("llama-2-7b", "h100", 1.2, batch=8)
    removed = [row.layer for row in plan.layers if (row.attention, row.mlp) == ("none", "none")]
    assert removed == list(range(removed[0], 31))
    assert "published losses" in plan.notes[0]
    with pytest.raises(InputError, match=r"no published loss of depth pruning for llama-3\.2-1b"):
        search(MODEL, "h100", 1.2)


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        ({}, "at least one of"),
        ({"speedup": 0.9}, "above 1"),
        ({"latency_s": -1.0}, "positive"),
        ({"parameters": float("nan")}, "positive"),
        ({"speedup": 1.5, "confidence": 1.0}, "probability from 0.5"),
    ],
)
@pytest.mark.quick
def test_targets_out_of_range_are_refused(targets: dict[str, float], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Targets(**targets)


# -- plans -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama-3.2-1b", "smollm2-135m", "qwen3-30b-a3b", "gemma-2-9b"])
def test_written_plans_give_the_same_model(name: str) -> None:
    model = load_model(name)
    library, random = generated_library(model), np.random.default_rng(0)
    for _ in range(3):
        pruned = planned(model, [own[int(random.integers(len(own)))] for own in library.layers])
        check_plan(text := plan_text(model, pruned), model, pruned)
    with pytest.raises(InputError, match="cannot state"):
        check_plan(text, model, replace(pruned, vocab=pruned.vocab + 64))


@pytest.mark.quick
def test_a_linear_sublayer_has_no_plan_text() -> None:
    from simulator.plans.variants import variant

    pruned = planned(MODEL, [variant("mlp", "linear", MODEL.usual), *MODEL.layout[1:]])
    with pytest.raises(InputError, match="no linear sublayers"):
        plan_text(MODEL, pruned)
