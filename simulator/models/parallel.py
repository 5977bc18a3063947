"""Split one model over several devices: the shapes that each device computes.

*Tensor* parallel splits every layer: each device gets an equal part of the query heads, key/value heads, inner width of
the MLP and vocabulary. The residual stream is complete on each device. The row-parallel projections (o, down) and the
split embedding end in an all-reduce, the logits in an all-gather (M. Shoeybi et al., "Megatron-LM", arXiv 1909.08053).
Fewer key/value heads than devices are replicated. Rows and their parameters then describe one device.

*Expert* parallel is tensor parallel except for routed experts: each device holds complete experts, an equal number, and
computes all tokens that use them; the others wait for the device with the highest load. The same all-reduce sums the
outputs. Attention is not split by sequences, so every
device sees all tokens and nothing is sent before the experts.

*Pipeline* parallel gives each device consecutive layers. One micro-batch passes all stages one after the other, so its
latency is the sum over all layers, as on one device, plus ``devices - 1`` sends. Several micro-batches in flight are
not modelled. Rows then describe the whole model; only memory is counted per device (:func:`simulator.memory`).
"""

from __future__ import annotations

from dataclasses import replace

from simulator.errors import InputError
from simulator.models.block import Block
from simulator.models.config import ModelConfig

PARALLEL: tuple[str, ...] = ("tensor", "expert", "pipeline")  # names of the ways to split a model


def shard(model: ModelConfig, devices: int, parallel: str) -> ModelConfig:
    """Return the model that one of ``devices`` computes; in a pipeline the whole model.

    Raises InputError if a width is not a multiple of the number of devices, or a pipeline has more stages than layers.
    """
    if parallel not in PARALLEL:
        raise InputError(f"parallel {parallel!r} is unknown; expected one of {', '.join(PARALLEL)}")
    where = f"devices {devices}: {model.name} has"
    if parallel == "pipeline" and devices > model.layers:
        raise InputError(f"{where} {model.layers} layers; a pipeline has at most one device per layer")
    if parallel == "pipeline" or devices == 1:
        return model

    def of_block(block: Block) -> Block:
        if reason := indivisible(block, devices, parallel):
            raise InputError(f"{where} {reason}")
        heads, kv_heads = block.heads // devices, max(block.kv_heads // devices, int(block.heads > 0))
        share = replace(block, heads=heads, inner=block.inner // devices, kv_heads=kv_heads)
        if not block.experts:
            return share
        if parallel == "expert":
            return replace(share, experts=block.experts // devices, active=block.active / devices)
        return replace(share, expert_inner=block.expert_inner // devices)

    return replace(model.each_block(of_block), vocab=-(-model.vocab // devices))  # engines pad the last part


def indivisible(block: Block, devices: int, parallel: str) -> str:
    """Return why tensor or expert parallel cannot divide a layer equally among devices, or ""."""
    sizes = {"{} attention heads": block.heads, "an MLP width of {}": block.inner}
    if block.experts and parallel == "expert":
        sizes["{} experts"] = block.experts
    elif block.experts:
        sizes["experts of a width of {}"] = block.expert_inner
    for what, size in sizes.items():
        if size % devices:
            return f"{what.format(size)}; {parallel} parallel needs a multiple of {devices}"
    few, many = sorted((block.kv_heads, devices))
    if few and many % few:
        return f"{block.kv_heads} key/value heads; {parallel} parallel needs a multiple or a divisor of {devices}"
    return ""
