"""ModelOpt's own solver reads the costs written here, and finds the plan that a search over all
plans finds."""

from __future__ import annotations

import itertools
import json
from argparse import Namespace
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from shaped import Layer, cut

from simulator.models.library import from_hf_config
from simulator.models.write import block_config, config_content
from simulator.plans.costs import Costs, costs
from simulator.plans.library import Library
from simulator.plans.variants import SUBLAYERS, joined, part_of
from simulator.plans.write import stats_args, stats_text

puzzle = pytest.importorskip(
    "modelopt.torch.puzzletron.mip.run_puzzle",
    reason="needs NVIDIA ModelOpt with Puzzletron: pip install 'nvidia-modelopt[puzzletron,hf]'",
    exc_type=ImportError,
)
# ModelOpt's own use of PuLP and of torch
pytestmark = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning"
)

CONTENT: dict[str, Any] = {
    **{
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": 64,
        "intermediate_size": 300,
    },
    **{
        "num_hidden_layers": 3,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "vocab_size": 100,
    },
}
MODEL = from_hf_config(CONTENT)
DENSE = MODEL.usual
FEWER, HALF = cut(DENSE, "attention", kv_heads=2), cut(DENSE, "mlp", inner=150)
ATTENTIONS = (DENSE, FEWER, DENSE.without("attention"))
MLPS = (DENSE, HALF, DENSE.without("mlp"))
VARIANTS = tuple(joined(a, m) for a, m in itertools.product(ATTENTIONS, MLPS))
NEW_TOKENS, BATCH = 64, 4


def random_costs(rng: np.random.Generator) -> Costs:
    """Return costs that no shape explains: a plan then depends on each of them."""
    library = Library(MODEL, (VARIANTS,) * len(MODEL.layers))
    found = costs(
        MODEL, "h100", library, phase="generate", batch=BATCH, seq=512, new_tokens=NEW_TOKENS
    )
    there = found.columns["variant"] != "none"
    own = dict(
        zip(
            ("prefill_s", "decode_s", "weights_bytes", "cache_bytes"),
            rng.integers(1, 1000, (4, len(found))),
        )
    )
    own = {
        name: values * there * (1e-6 if name.endswith("_s") else 1e3)
        for name, values in own.items()
    }
    return replace(
        found, columns={**found.columns, **own, "seconds": own["prefill_s"] + own["decode_s"]}
    )


def dense_sum(found: Costs, *names: str) -> float:
    return float(
        sum(found.columns[name][found.columns["variant"] == "dense"].sum() for name in names)
    )


def validations(path: Path, rng: np.random.Generator) -> dict[tuple[int, Layer], float]:
    """Write a folder as Puzzletron's validation of single replacements does, with its teacher;
    return the scores."""
    teacher = path / "ckpts" / "teacher"
    teacher.mkdir(parents=True)
    configs = [block_config(one, one) for one in MODEL.layers]
    (teacher / "config.json").write_text(json.dumps(CONTENT | {"block_configs": configs}))
    rows = {}
    for layer, one in itertools.product(range(len(MODEL.layers)), VARIANTS):
        checkpoint = teacher if one == DENSE else path / "ckpts" / "own"
        rows[layer, one] = {
            "parent_layer_indices": [layer],
            "child_block_configs": [block_config(one, DENSE)],
            "weight_paths": [
                str(checkpoint / "subblocks_safetensors" / f"block_{layer}_ffn.safetensors")
            ],
        }
    (path / "replacement_library.json").write_text(json.dumps(list(rows.values())))
    scores = {key: 0.0 if key[1] == DENSE else float(rng.integers(1, 1000)) / 1000 for key in rows}
    for i, key in enumerate(key for key in rows if key[1] != DENSE):
        solution = {"single_sequence_replacement": rows[key], "chosen_replacements": [rows[key]]}
        own = {
            "kl_div": {"avg": scores[key], "per_sample": [scores[key]]},
            "puzzle_solution": solution,
        }
        (path / f"solution_{i}.json").write_text(json.dumps(own))
    args = {"teacher_dir": str(teacher), "descriptor": "llama"}
    args |= {"replacement_library_path": str(path / "replacement_library.json")}
    (path / "teacher.json").write_text(json.dumps({"lm_loss": {"avg": 2.0}, "args": args}))
    return scores


def solved(path: Path, found: Costs, constraints: dict[str, float]) -> dict[str, Any]:
    """Return the solution that ModelOpt writes, from files as a user has them."""
    stats = path / "subblock_stats.json"
    stats.write_text(stats_text(found))
    args = Namespace(
        **{
            "puzzle_profile": None,
            "single_block_replacement_validation_dir": path,
            "gathered_metrics_path": None,
        },
        **{
            "subblock_stats_path": stats,
            "subblock_stats_args": [stats_args(MODEL, found.settings[0])],
        },
        **{
            "objective": "metrics.kl_div",
            "mip_constraints": None,
            "human_constraints": constraints,
        },
        **{
            "report_additional_costs": [],
            "output_path": path / "out",
            "max_seconds_per_solution": 60.0,
        },
        **{"metric_overrides": None, "bigger_is_better": False},
    )
    (file,) = puzzle.run_puzzle(args)
    (solution,) = json.loads(Path(file).read_text())
    return dict(solution)


@pytest.mark.parametrize("seed", range(4))
def test_its_solver_finds_the_best_plan_at_a_latency(tmp_path: Path, seed: int) -> None:
    rng = np.random.default_rng(seed)
    found, scores = random_costs(rng), validations(tmp_path, rng)
    most = 0.6 * dense_sum(found, "seconds")
    *sublayers, outside = zip(found.rows, found.layers)
    cost = {(row["layer"], row["sublayer"], one): row["seconds"] for row, one in sublayers}
    plans = []
    for plan in itertools.product(VARIANTS, repeat=len(MODEL.layers)):
        parts = [
            cost[i, name, part_of(name, one)] for i, one in enumerate(plan) for name in SUBLAYERS
        ]
        if outside[0]["seconds"] + sum(parts) <= most:
            plans.append(sum(scores[i, one] for i, one in enumerate(plan)))
    theirs = solved(tmp_path, found, {"target_latency_seconds": most})
    assert theirs["total_value"] == {"metrics.kl_div": pytest.approx(min(plans))}
    assert theirs["total_costs"]["stats.runtime_ms"] <= 1000 * most


def test_its_other_targets_are_met(tmp_path: Path) -> None:
    rng = np.random.default_rng(7)
    found, _ = random_costs(rng), validations(tmp_path, rng)
    first = 0.5 * dense_sum(found, "prefill_s")
    memory = 0.7 * dense_sum(found, "weights_bytes", "cache_bytes") / 2**20
    rate = 1.3 * BATCH * NEW_TOKENS / dense_sum(found, "seconds")
    targets = {
        "target_time_to_first_token": first,
        "target_memory": memory,
        "target_throughput": rate,
    }
    total = solved(tmp_path, found, targets)["total_costs"]
    assert total["stats.prefill_runtime_ms"] <= 1000 * first
    assert total["stats.memory_mib"] <= memory
    assert total["throughput"] >= rate


def test_it_reads_a_written_config(tmp_path: Path) -> None:
    utils = pytest.importorskip("modelopt.torch.puzzletron.tools.checkpoint_utils")
    plan = (FEWER, HALF.without("attention"), DENSE.without("mlp"))
    content = config_content(CONTENT, MODEL, MODEL.with_layers(plan))
    (tmp_path / "config.json").write_text(json.dumps(content))
    configs = [puzzle.BlockConfig(**block_config(one, DENSE)) for one in plan]
    assert utils.load_model_config(tmp_path).block_configs == configs
