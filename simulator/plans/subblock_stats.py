"""Write prices and plans as ModelOpt's Puzzletron reads them: ``subblock_stats.json`` and ``solutions.json``.

Use :func:`subblock_stats` with the prices of all sublayers, :func:`solutions` with a chosen plan. With the first file,
``target_latency_seconds``, ``target_throughput``, ``target_time_to_first_token`` and ``target_memory`` of Puzzletron
need no measurement.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from simulator.engines.engine import load_engine
from simulator.errors import InputError, unknown
from simulator.models.block import Block
from simulator.models.block_configs import block_config
from simulator.models.config import ModelConfig
from simulator.models.lower import stream_of
from simulator.plans import prices
from simulator.plans.variants import SUBLAYERS, part_of

if TYPE_CHECKING:
    from simulator.plans.costs import Costs
    from simulator.plans.search import Plan

MIB = 2.0**20

NONE: Mapping[Any, Any] = MappingProxyType({})

DTYPE_NAMES: Mapping[str, str] = MappingProxyType(
    {
        "fp32": "torch.float32",
        "tf32": "torch.float32",
        "fp16": "torch.float16",
        "bf16": "torch.bfloat16",
        "fp8": "torch.float8_e4m3fn",
        "fp8_block": "torch.float8_e4m3fn",
        "int8": "torch.int8",
        "int4": "int4",
        "nvfp4": "nvfp4",
        "mxfp4": "mxfp4",
    }
)
"""Names of number formats in ModelOpt: those of torch, else their own."""

_CLASSES = {"attention": ("attention", "AttentionConfig"), "mlp": ("ffn", "FFNConfig")}


@dataclass(frozen=True)
class SubblockRequest:
    """What prices are for: a batch of requests with ``seq`` tokens of prompt and ``new_tokens`` tokens of answer."""

    hardware: str
    batch: int
    seq: int
    new_tokens: int
    weights: str = "bf16"  # formats, by their names in simulator.workload.DTYPES
    activations: str = "bf16"
    cache: str = "bf16"
    cuda_graph: bool = True


@dataclass(frozen=True)
class Price:
    """Costs of a sublayer, or of all that is outside the layers, for a whole batch of requests."""

    seconds: float  # prefill and all steps of decode
    prefill_s: float
    decode_s: float  # all steps
    parameters: int
    active_parameters: int
    memory_bytes: float  # weights and cache
    cache_bytes: float = 0.0


@dataclass(frozen=True)
class PricedSublayer:
    """A priced sublayer ("attention" or "mlp") of a variant of a layer."""

    layer: int
    sublayer: str
    block: Block
    price: Price


@dataclass(frozen=True)
class Priced:
    """Prices of one setting."""

    setting: SubblockRequest
    outside: Price
    sublayers: tuple[PricedSublayer, ...]


def subblock_stats(model: ModelConfig, priced: Iterable[Priced]) -> list[dict[str, Any]]:
    """Return the content of ModelOpt's ``subblock_stats.json``.

    Parameters
    ----------
    model : ModelConfig
        Dense model.
    priced : iterable of Priced
        Prices per setting: of each sublayer that a plan may have, also of missing ones (with prices of 0). Of equal
        sublayers of a layer, the first counts.

    Returns
    -------
    list of dict
        One object per setting, in milliseconds and MiB.

    Raises
    ------
    InputError
        If a layer is not in the model, or has a sublayer that ``block_configs`` cannot state.

    Examples
    --------
    >>> from simulator.models.library import load_model
    >>> model = load_model("llama-3.1-8b")
    >>> price = Price(0.002, 0.0005, 0.0015, 176160768, 176160768, 352321536.0)
    >>> setting = SubblockRequest("h100_sxm", batch=1, seq=2048, new_tokens=128)
    >>> (found,) = subblock_stats(model, [Priced(setting, price, (PricedSublayer(0, "mlp", model.usual, price),))])
    >>> found["subblocks"][0]["subblock_config"]["intermediate_size"], found["subblocks"][0]["runtime_ms"]
    (14336, 2.0)
    """
    return [
        {
            "args": stats_args(model, one.setting),
            "non_block": _costs(one.outside),
            "subblocks": list(_subblocks(model, one.sublayers)),
        }
        for one in priced
    ]


def stats_of(found: Costs) -> list[dict[str, Any]]:
    """Return the content of ``subblock_stats.json`` for the costs of :func:`simulator.costs`.

    >>> from simulator.plans.costs import costs
    >>> (one,) = stats_of(costs("llama-3.1-8b", "h100", phase="generate", batch=8))
    >>> sorted({row["subblock_config_class"] for row in one["subblocks"]}), one["args"]["generation_seq_len"]
    (['AttentionConfig', 'FFNConfig'], 128)
    """
    model, rows = found.model, found.rows
    each, priced = len(rows) // len(found.settings), []
    for i, at in enumerate(found.settings):
        own = slice(i * each, (i + 1) * each)
        *sublayers, outside = [
            PricedSublayer(row["layer"], row["sublayer"], block, _price(model, row, block))
            for row, block in zip(rows[own], found.blocks[own])
        ]
        priced.append(Priced(request_of(at), outside.price, tuple(sublayers)))
    return subblock_stats(model, priced)


def stats_text(found: Costs) -> str:
    """Return the text of ``subblock_stats.json``."""
    return json.dumps(stats_of(found), indent=1, allow_nan=False) + "\n"


def _price(model: ModelConfig, row: Mapping[str, Any], block: Block) -> Price:
    """Return the price in a row of costs."""
    idle = (block.experts - block.active) * model.expert_parameters(block) if block.experts else 0.0
    return Price(
        seconds=row["seconds"],
        prefill_s=row["prefill_s"],
        decode_s=row["decode_s"],
        parameters=round(row["parameters"]),
        active_parameters=round(row["parameters"] - (idle if row["sublayer"] == "mlp" else 0.0)),
        memory_bytes=row["weights_bytes"] + row["cache_bytes"],
        cache_bytes=row["cache_bytes"],
    )


def request_of(at: prices.PricedRequest) -> SubblockRequest:
    """Return the setting of a search in the terms of ModelOpt; a decode step has one new token."""
    scenario, engine = at.scenario, load_engine(at.engine)
    return SubblockRequest(
        hardware=at.device,
        batch=at.batch,
        seq=at.seq,
        new_tokens={"prefill": 0, "decode": 1}.get(at.phase, scenario.new_tokens),
        weights=scenario.weight_dtype or scenario.dtype,
        activations=scenario.dtype,
        cache=scenario.kv_dtype or stream_of(scenario.dtype),
        cuda_graph=engine.in_graph("decode"),
    )


def solutions_of(plan: Plan) -> list[dict[str, Any]]:
    """Return the content of ``solutions.json`` for a plan of :func:`simulator.search`."""
    first = plan.results[0]
    totals = {
        "stats.runtime_ms": first.pruned_s * 1e3,
        "stats.memory_mib": first.pruned_memory_bytes / MIB,
        "stats.num_params": float(plan.pruned.parameters),
    }
    objective = f"metrics.{plan.metric}"
    return solutions(plan.dense, plan.pruned.layout, objective, plan.score, totals, request_of(plan.settings[0]))


def stats_args(model: ModelConfig, setting: SubblockRequest) -> dict[str, Any]:
    """Return the setting in ModelOpt's keys; Puzzletron selects prices by them (``subblock_stats_args``).

    >>> from simulator.models.library import load_model
    >>> stats_args(load_model("llama-3.1-8b"), SubblockRequest("h100_sxm", 1, 2048, 128))["weights_dtype"]
    'torch.bfloat16'
    """
    formats = {"weights": setting.weights, "activations": setting.activations, "kv_cache": setting.cache}
    for name in formats.values():
        if name not in DTYPE_NAMES:
            raise unknown("dtype", name, DTYPE_NAMES)
    return {
        "gpu": setting.hardware,
        "batch_size": setting.batch,
        "prefill_seq_len": setting.seq,
        "generation_seq_len": setting.new_tokens,
        "prefill_queue_size": 0,
        "n_embd": model.hidden,
        "n_head": model.heads,
        "vocab_size": model.vocab,
        "runtime_stats": True,
        "use_cuda_graph": setting.cuda_graph,
        **{f"{key}_dtype": DTYPE_NAMES[name] for key, name in formats.items()},
    }


def _costs(price: Price) -> dict[str, Any]:
    return {
        "runtime_ms": price.seconds * 1e3,
        "prefill_runtime_ms": price.prefill_s * 1e3,
        "decode_runtime_ms": price.decode_s * 1e3,
        "memory_mib": price.memory_bytes / MIB,
        "num_params": int(price.parameters),
    }


def _subblocks(model: ModelConfig, sublayers: Iterable[PricedSublayer]) -> Iterable[dict[str, Any]]:
    seen = set()
    for one in sublayers:
        if one.sublayer not in SUBLAYERS:
            raise unknown("sublayer", one.sublayer, SUBLAYERS)
        dense = _dense(model, one.layer)
        key = (one.layer, one.sublayer, part_of(one.sublayer, one.block))
        if key in seen:
            continue
        seen.add(key)
        name, class_name = _CLASSES[one.sublayer]
        yield {
            "subblock_config": block_config(part_of(one.sublayer, one.block), dense)[name],
            "subblock_config_class": class_name,
            **_costs(one.price),
            "active_params": int(one.price.active_parameters),
            "parent_layer_index": one.layer,
            "kv_cache_memory_mib": one.price.cache_bytes / MIB,
        }


def _dense(model: ModelConfig, layer: int) -> Block:
    if not 0 <= layer < model.layers:
        raise InputError(f"layer: expected numbers from 0 to {model.layers - 1}, got {layer}")
    return model.layout[layer]


def solutions(
    model: ModelConfig,
    plan: Sequence[Block],
    objective: str,
    value: float,
    costs: Mapping[str, float],
    setting: SubblockRequest | None = None,
    weight_paths: Mapping[tuple[int, Block], Sequence[str]] = NONE,
) -> list[dict[str, Any]]:
    """Return the content of the ``solutions.json`` that Puzzletron's solver writes, for one chosen plan.

    Parameters
    ----------
    model : ModelConfig
        Dense model.
    plan : sequence of Block
        Chosen variant of each layer.
    objective : str
        Name of the score, such as ``metrics.kl_div``.
    value : float
        Sum of the scores.
    costs : mapping
        Total costs by name, such as ``stats.runtime_ms``, with all that is outside the layers.
    setting : SubblockRequest, optional
        What the costs are for.
    weight_paths : mapping, optional
        Files with the weights of variants, by layer and shapes
        (:func:`simulator.plans.puzzletron.read_weight_paths`). Without them, Puzzletron can read the plan, but not
        build the model.

    Returns
    -------
    list of dict
        One solution.

    Raises
    ------
    InputError
        If the plan has another number of layers, or a layer that ``block_configs`` cannot state.

    Examples
    --------
    >>> from simulator.models.library import load_model
    >>> model = load_model("llama-3.1-8b")
    >>> (found,) = solutions(model, model.layout, "metrics.kl_div", 0.0, {"stats.runtime_ms": 900.0})
    >>> found["solution_repr"].splitlines()[0]
    'block_0:   attention  kv_heads_8  ffn  intermediate_14336'
    """
    if len(plan) != model.layers:
        raise InputError(f"plan: expected {model.layers} layers, as {model.name}, got {len(plan)}")
    configs = [block_config(block, dense) for block, dense in zip(plan, model.layout)]
    chosen = [
        {
            "parent_layer_indices": [layer],
            "block_config": config,
            "child_block_configs": config,  # as the solver writes it: no list
            "layer_replacement": {
                "parent_layer_indices": [layer],
                "child_block_configs": [config],
                "weight_paths": list(weight_paths.get((layer, block), ())),
            },
            "is_teacher": block == model.layout[layer],
        }
        for layer, (block, config) in enumerate(zip(plan, configs))
    ]
    total = dict(costs)
    if setting and total.get("stats.runtime_ms"):
        total["throughput"] = 1e3 * setting.batch * setting.new_tokens / total["stats.runtime_ms"]
    return [
        {
            "chosen_replacements": chosen,
            "total_value": {objective: value},
            "total_costs": total,
            "puzzle_args": {"objective": objective},
            "subblock_stats": stats_args(model, setting) if setting else {},
            "chosen_block_configs": configs,
            "solution_repr": "".join(f"{f'block_{i}:':9}{_shown(c)}\n" for i, c in enumerate(configs)),
        }
    ]


def _shown(config: Mapping[str, Any]) -> str:
    """Return a layer in the words of Puzzletron."""
    attention, mlp = config["attention"], config["ffn"]
    moe, texts = mlp.get("moe"), []
    for name, own in (("attention", attention), ("moe" if moe else "ffn", mlp)):
        if own["no_op"] or own["replace_with_linear"]:
            size = "no_op " if own["no_op"] else "linear"
        elif moe and name == "moe":
            keys = ("expert_intermediate_dim", "shared_expert_intermediate_dim", "num_experts_per_tok")
            size = "  ".join([f"num_experts_{moe['num_local_experts']}", *(f"{key}_{moe[key]}" for key in keys)])
        else:
            size = (
                f"kv_heads_{own['num_key_value_heads']}"
                if name == "attention"
                else f"intermediate_{own['intermediate_size']}"
            )
        texts.append(f"  {name}  {size}")
    return "".join(texts)
