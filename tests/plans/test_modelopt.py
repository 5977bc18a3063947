"""ModelOpt's own solver reads the prices written here, and finds the plan that a search over all plans finds."""

from __future__ import annotations

import itertools
import json
from argparse import Namespace
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from simulator.plans.subblock_stats import (
    Price,
    Priced,
    PricedSublayer,
    SubblockRequest,
    solutions,
    stats_args,
    subblock_stats,
)

from simulator.models.block import Block
from simulator.models.block_configs import block_config, block_configs_of
from simulator.models.changes import config_of
from simulator.models.huggingface import from_hf_config
from simulator.plans.library import read_library

puzzle = pytest.importorskip(
    "modelopt.torch.puzzletron.mip.run_puzzle",
    reason="needs NVIDIA ModelOpt with Puzzletron: pip install 'nvidia-modelopt[puzzletron,hf]'",
    exc_type=ImportError,
)
# ModelOpt's own use of PuLP and of torch
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")

CONTENT: dict[str, Any] = {
    **{"model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 64, "intermediate_size": 300},
    **{"num_hidden_layers": 3, "num_attention_heads": 8, "num_key_value_heads": 4, "vocab_size": 100},
}
MODEL = from_hf_config(CONTENT)
DENSE = MODEL.usual
ATTENTIONS = (DENSE, replace(DENSE, kv_heads=2), Block(0, 0, 300))
MLPS = (DENSE, replace(DENSE, inner=150), replace(DENSE, inner=0))
SETTING = SubblockRequest("h100_sxm", batch=4, seq=512, new_tokens=64)


def variants() -> list[Block]:
    return [
        replace(mlp, heads=attention.heads, kv_heads=attention.kv_heads)
        for attention, mlp in itertools.product(ATTENTIONS, MLPS)
    ]


def prices(rng: np.random.Generator) -> Priced:
    """Return prices that no shape explains: a plan then depends on each of them."""

    def price(nothing: bool) -> Price:
        prefill, decode, memory, cache = rng.integers(1, 1000, 4) * 1e-6 * (not nothing)
        own = int(memory * 1e9)
        return Price(prefill + decode, prefill, decode, own, own, 1e9 * memory, 1e8 * cache)

    sublayers = [
        PricedSublayer(layer, name, block, price(block is own[-1]))
        for layer in range(MODEL.layers)
        for name, own in (("attention", ATTENTIONS), ("mlp", MLPS))
        for block in own
    ]
    return Priced(SETTING, price(False), tuple(sublayers))


def validations(path: Path, rng: np.random.Generator) -> dict[tuple[int, Block], float]:
    """Write a folder as Puzzletron's validation of single replacements does, with its teacher; return the scores."""
    teacher = path / "ckpts" / "teacher"
    teacher.mkdir(parents=True)
    (teacher / "config.json").write_text(json.dumps(CONTENT | {"block_configs": block_configs_of(MODEL)}))
    rows = {}
    for layer, block in itertools.product(range(MODEL.layers), variants()):
        checkpoint = teacher if block == DENSE else path / "ckpts" / "own"
        rows[layer, block] = {
            "parent_layer_indices": [layer],
            "child_block_configs": [block_config(block, DENSE)],
            "weight_paths": [str(checkpoint / "subblocks_safetensors" / f"block_{layer}_ffn.safetensors")],
        }
    (path / "replacement_library.json").write_text(json.dumps(list(rows.values())))
    scores = {key: 0.0 if key[1] == DENSE else float(rng.integers(1, 1000)) / 1000 for key in rows}
    students = [key for key in rows if key[1] != DENSE]
    for i, key in enumerate(students):
        solution = {"single_sequence_replacement": rows[key], "chosen_replacements": [rows[key]]}
        own = {"kl_div": {"avg": scores[key], "per_sample": [scores[key]]}, "puzzle_solution": solution}
        (path / f"solution_{i}.json").write_text(json.dumps(own))
    args = {"teacher_dir": str(teacher), "descriptor": "llama"}
    args |= {"replacement_library_path": str(path / "replacement_library.json")}
    (path / "teacher.json").write_text(json.dumps({"lm_loss": {"avg": 2.0}, "args": args}))
    return scores


def best(priced: Priced, scores: dict[tuple[int, Block], float], most_s: float) -> tuple[float, tuple[Block, ...]]:
    """Return the best plan of all: the lowest sum of scores whose time is at most ``most_s``."""
    cost: dict[tuple[int, str, int], float] = {}
    for one in priced.sublayers:
        width = one.block.kv_heads if one.sublayer == "attention" else one.block.inner
        cost[one.layer, one.sublayer, width] = one.price.seconds
    plans = []
    for plan in itertools.product(variants(), repeat=MODEL.layers):
        time = priced.outside.seconds
        for i, block in enumerate(plan):
            time += cost[i, "attention", block.kv_heads] + cost[i, "mlp", block.inner]
        if time <= most_s:
            plans.append((sum(scores[i, block] for i, block in enumerate(plan)), plan))
    return min(plans, key=lambda found: found[0])


def solved(path: Path, priced: Priced, constraints: dict[str, float]) -> dict[str, Any]:
    """Return the solution that ModelOpt writes, from files as a user has them."""
    stats = path / "subblock_stats.json"
    stats.write_text(json.dumps(subblock_stats(MODEL, [priced])))
    args = Namespace(
        **{"puzzle_profile": None, "single_block_replacement_validation_dir": path, "gathered_metrics_path": None},
        **{"subblock_stats_path": stats, "subblock_stats_args": [stats_args(MODEL, SETTING)]},
        **{"objective": "metrics.kl_div", "mip_constraints": None, "human_constraints": constraints},
        **{"report_additional_costs": [], "output_path": path / "out", "max_seconds_per_solution": 60.0},
        **{"metric_overrides": None, "bigger_is_better": False},
    )
    (file,) = puzzle.run_puzzle(args)
    (found,) = json.loads(Path(file).read_text())
    return dict(found)


@pytest.mark.parametrize("seed", range(4))
def test_its_solver_finds_the_best_plan_at_a_latency(tmp_path: Path, seed: int) -> None:
    rng = np.random.default_rng(seed)
    priced, scores = prices(rng), validations(tmp_path, rng)
    dense = priced.outside.seconds + sum(p.price.seconds for p in priced.sublayers if p.block is DENSE)
    target = 0.6 * dense
    value, plan = best(priced, scores, target)
    theirs = solved(tmp_path, priced, {"target_latency_seconds": target})
    assert theirs["total_value"] == {"metrics.kl_div": pytest.approx(value)}
    assert theirs["total_costs"]["stats.runtime_ms"] <= 1000 * target
    # the plan as it is written here is theirs, but for keys with defaults
    (ours,) = solutions(MODEL, plan, "metrics.kl_div", value, theirs["total_costs"], SETTING)
    configs = [[puzzle.BlockConfig(**c) for c in found["chosen_block_configs"]] for found in (ours, theirs)]
    assert configs[0] == configs[1]
    assert ours["solution_repr"] == theirs["solution_repr"]
    assert ours["total_costs"] == theirs["total_costs"]
    assert ours["subblock_stats"] == theirs["subblock_stats"]
    assert ours.keys() == theirs.keys()


def test_its_other_targets_are_met(tmp_path: Path) -> None:
    rng = np.random.default_rng(7)
    priced, _ = prices(rng), validations(tmp_path, rng)
    outside = priced.outside
    dense = [p.price for p in priced.sublayers if p.block is DENSE]
    first, memory = (
        0.5 * (outside.prefill_s + sum(p.prefill_s for p in dense)),
        0.7 * (outside.memory_bytes + sum(p.memory_bytes for p in dense)) / 2**20,
    )
    rate = 1.3 * SETTING.batch * SETTING.new_tokens / (outside.seconds + sum(p.seconds for p in dense))
    targets = {"target_time_to_first_token": first, "target_memory": memory, "target_throughput": rate}
    costs = solved(tmp_path, priced, targets)["total_costs"]
    assert costs["stats.prefill_runtime_ms"] <= 1000 * first
    assert costs["stats.memory_mib"] <= memory
    assert costs["throughput"] >= rate


def test_its_folder_and_its_gathered_metrics_are_one_library(tmp_path: Path) -> None:
    rng = np.random.default_rng(3)
    priced, scores = prices(rng), validations(tmp_path, rng)
    solved(tmp_path, priced, {"target_latency_seconds": 1.0})
    (gathered,) = (tmp_path / "out").rglob("replacement_metrics_and_stats.json")
    folder, file = read_library(tmp_path, MODEL), read_library(gathered, MODEL)
    for layer in range(MODEL.layers):
        assert set(folder.layers[layer]) == set(file.layers[layer]) == set(variants())
        for library in (folder, file):
            own = dict(zip(library.layers[layer], library.values["kl_div"][layer]))
            assert own == {block: scores[layer, block] for block in variants()}
        times = dict(zip(file.layers[layer], file.values["runtime_ms"][layer]))
        cost = {(p.sublayer, p.block): p.price.seconds for p in priced.sublayers if p.layer == layer}
        assert times[DENSE] == pytest.approx(1000 * (cost["attention", DENSE] + cost["mlp", DENSE]))
    assert read_library(tmp_path / "replacement_library.json", MODEL).layers == tuple(
        tuple(dict.fromkeys(variants())) for _ in range(MODEL.layers)
    )


def test_its_later_steps_read_a_plan_and_a_config(tmp_path: Path) -> None:
    validate = pytest.importorskip("modelopt.torch.puzzletron.tools.validate_puzzle_with_multi_replacements")
    utils = pytest.importorskip("modelopt.torch.puzzletron.tools.checkpoint_utils")
    plan = (replace(DENSE, kv_heads=2), Block(0, 0, 150), replace(DENSE, inner=0))
    paths = {(0, plan[0]): ["/own/block_0_ffn.safetensors"]}
    file = tmp_path / "solutions.json"
    file.write_text(json.dumps(solutions(MODEL, plan, "metrics.kl_div", 0.5, {"stats.runtime_ms": 1.0}, None, paths)))
    (found,) = validate.load_puzzle_solutions(file, None, bigger_is_better=False)
    rows = validate._extract_layer_replacements_from_puzzle_solution(found)
    assert validate.can_realize_as_symlinks(rows)
    assert rows[0]["weight_paths"] == [Path("/own/block_0_ffn.safetensors")]
    content = config_of(CONTENT, MODEL, replace(MODEL, blocks=plan))
    assert content["model_type"] == "llama"  # 150 is no multiple of 256
    (tmp_path / "config.json").write_text(json.dumps(content))
    loaded = utils.load_model_config(tmp_path)
    assert loaded.block_configs == [row["child_block_configs"][0] for row in rows]
