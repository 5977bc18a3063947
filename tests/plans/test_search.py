"""Costs and searches: sums, targets, the frontier, and bad input."""

from __future__ import annotations

from itertools import product
from pathlib import Path

import numpy as np
import pytest

from simulator.errors import InputError
from simulator.hardware.library import load_hardware
from simulator.models.library import load_model
from simulator.plans.costs import PricedRequest, costs, planned, quantities
from simulator.plans.library import read_library
from simulator.plans.search import Plan, search
from simulator.plans.solve import Targets
from simulator.plans.write import write_plan
from simulator.request import Request

MODEL = load_model("llama-3.2-1b")  # 16 layers
AT = PricedRequest(Request(phase="decode", batch=8, seq=2048), load_hardware("h100"))


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Scores of eight variants of each layer that fall with the width, at random."""
    random = np.random.default_rng(0)
    lines = ["layer,attention,mlp,kl_div"]
    for layer in range(len(MODEL.layers)):
        rise = np.sort(random.random(4)) * random.uniform(0.5, 2.0)
        lost = random.uniform(0.2, 1.5)
        for i, mlp in enumerate(("dense", "6144", "4096", "none")):
            for attention in ("dense", "none"):
                value = (rise[i] if i else 0.0) + (lost if attention == "none" else 0.0)
                lines.append(f"{layer},{attention},{mlp},{value:.6f}")
    file = tmp_path_factory.mktemp("scores") / "scores.csv"
    file.write_text("\n".join(lines) + "\n")
    return file


@pytest.fixture(scope="module")
def plan(file: Path) -> Plan:
    return search(MODEL, "h100", 1.5, file, batch=8)


# -- costs -----------------------------------------------------------------------------------------


def test_the_cost_of_a_cache_is_that_of_its_heads() -> None:
    columns = costs(MODEL, "h100", batch=8, seq=1000).columns
    own = (columns["layer"] == 3) & (columns["sublayer"] == "attention")
    cache = dict(zip(columns["variant"][own].tolist(), columns["cache_bytes"][own].tolist()))
    positions = 63 * 16  # 1,001 in whole blocks of vLLM
    each = 2 * MODEL.kv_heads * MODEL.head_dim * 2
    assert cache["dense"] == 2 * cache["kv=4"] == 8 * positions * each


# -- searches --------------------------------------------------------------------------------------


def test_the_plan_meets_the_target_and_no_single_change_is_better(file: Path, plan: Plan) -> None:
    assert plan.results[0].speedup >= 1.5
    assert plan.gap == 0.0
    assert abs(plan.sum_error) < 1e-9  # under CUDA graphs, costs add up to the plan
    assert plan.score == pytest.approx(sum(row.score for row in plan.layers))
    library, layers = read_library(file, MODEL), list(plan.pruned.layers)
    for layer, own in enumerate(library.layers):
        for one, score in zip(own, library.values["kl_div"][layer]):
            if score < plan.layers[layer].score - 1e-9:
                other = planned(MODEL, [*layers[:layer], one, *layers[layer + 1 :]])
                assert quantities([MODEL, other], AT)["speedup"][1] < 1.5


def test_the_plan_equals_brute_force_over_predicted_models(tmp_path: Path) -> None:
    choices, random, free = tmp_path / "few.csv", np.random.default_rng(7), (2, 5, 8, 11)
    rows = ["layer,attention,mlp,kl_div", "all,dense,dense,0"]
    for layer in free:
        several = [("none", "dense", 0.0), ("dense", "4096", 0.0), ("none", "none", 1.0)]
        rows += [f"{layer},{a},{m},{s + random.random():.6f}" for a, m, s in several]
    choices.write_text("\n".join(rows) + "\n")
    library = read_library(choices, MODEL)
    plans, scores = [], []
    for chosen in product(range(4), repeat=len(free)):
        pick = dict(zip(free, chosen))
        plans.append(planned(MODEL, [own[pick.get(i, 0)] for i, own in enumerate(library.layers)]))
        scores.append(sum(library.values["kl_div"][i][pick[i]] for i in free))
    found = quantities([MODEL, *plans], AT)
    right = (found["speedup"][1:] >= 1.08) & (found["parameters"][1:] <= 1.16e9)
    assert 0 < right.sum() < len(plans)
    plan = search(MODEL, "h100", Targets(speedup=1.08, parameters=1.16e9), choices, batch=8)
    assert plan.score == pytest.approx(np.array(scores)[right].min())


def test_confidence_makes_plans_faster(file: Path, plan: Plan) -> None:
    sure = search(MODEL, "h100", Targets(speedup=1.5, confidence=0.9), file, batch=8)
    assert sure.results[0].speedup > plan.results[0].speedup
    assert sure.score > plan.score
    assert sure.targets[0].probability >= 0.899
    assert 0.5 <= plan.targets[0].probability < 0.9


def test_several_targets_hold_in_every_setting(file: Path) -> None:
    targets = Targets(tokens_per_s=9000.0, memory_bytes=5.0e9, parameters=1.05e9, tpot_s=0.0035)
    plan = search(MODEL, ["h100", "a100"], targets, file, batch=[16, 32], seq=1024)
    assert len(plan.results) == 4
    assert len(plan.targets) == 16
    for row in plan.targets:
        better = (
            row.reached >= row.wanted
            if row.target == "tokens_per_s"
            else row.reached <= row.wanted * (1 + 1e-9)
        )
        assert better, row


def test_time_to_first_token_is_a_target_of_generate(file: Path) -> None:
    dense = search(MODEL, "a100", Targets(ttft_s=10.0), file, phase="generate", seq=4096)
    assert all((row.attention, row.mlp) == ("dense", "dense") for row in dense.layers)
    wanted = 0.8 * dense.results[0].ttft_s
    plan = search(MODEL, "a100", Targets(ttft_s=wanted), file, phase="generate", seq=4096)
    assert plan.results[0].ttft_s <= wanted
    with pytest.raises(InputError, match="TTFT: decode has none"):
        search(MODEL, "a100", Targets(ttft_s=1.0), file, phase="decode")


def test_uniform_plans_have_one_shape(file: Path, plan: Plan) -> None:
    one = search(MODEL, "h100", 1.5, file, batch=8, uniform=True)
    shapes = {(row.attention, row.mlp) for row in one.layers} - {("none", "none")}
    assert len(shapes) == 1
    assert one.results[0].speedup >= 1.5
    assert one.score >= plan.score


def test_devices_exclude_what_they_cannot_share(tmp_path: Path) -> None:
    file = tmp_path / "scores.csv"
    file.write_text("layer,mlp,kl_div\nall,dense,0\nall,4098,0.1\nall,4096,0.2\nall,none,2\n")
    plan = search(MODEL, "h100", 1.2, file, batch=8, devices=4)
    assert "4098" not in {row.mlp for row in plan.layers}
    assert "16 variants are excluded" in plan.notes[0]


def test_the_frontier_rises_in_score_and_speed(plan: Plan) -> None:
    scores, times = ([getattr(p, name) for p in plan.frontier] for name in ("score", "pruned_s"))
    assert scores == sorted(scores)
    assert times == sorted(times, reverse=True)
    assert [p.chosen for p in plan.frontier].count(True) == 1


def test_a_higher_metric_can_be_better(file: Path, plan: Plan, tmp_path: Path) -> None:
    first, *rows = file.read_text().splitlines()
    pairs = [row.rsplit(",", 1) for row in rows]
    up = tmp_path / "accuracy.csv"
    up.write_text(
        "\n".join([first.replace("kl_div", "accuracy"), *(f"{a},{1 - float(s)}" for a, s in pairs)])
    )
    assert search(MODEL, "h100", 1.5, up, batch=8, maximise=True).score == pytest.approx(
        plan.score, abs=1e-4
    )
    assert "; use --maximise if" in " ".join(search(MODEL, "h100", 1.5, up, batch=8).notes)
    assert "; omit --maximise if" in " ".join(
        search(MODEL, "h100", 1.5, file, batch=8, maximise=True).notes
    )


def test_unreachable_targets_name_the_nearest_plan(file: Path) -> None:
    with pytest.raises(
        InputError, match=r"the nearest reaches speedup [\d.]+x of 100x on h100_sxm in vllm"
    ) as error:
        search(MODEL, "h100", 100.0, file, batch=8)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        ({}, "expected at least one, such as"),
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


def test_a_plan_is_not_written_through_a_link(plan: Plan, tmp_path: Path) -> None:
    mine, link = tmp_path / "mine", tmp_path / "plan.yaml"
    mine.write_text("mine")
    link.symlink_to(mine)
    (tmp_path / "other").symlink_to(mine)  # nothing is written to it
    with pytest.raises(InputError, match=r"plan\.yaml: expected a file, got a link"):
        write_plan(plan, plan.dense.name, str(tmp_path))
    assert (mine.read_text(), (tmp_path / "config.json").exists()) == ("mine", False)
    link.unlink()
    write_plan(plan, plan.dense.name, str(tmp_path))
    assert link.read_text().startswith("layers:")
