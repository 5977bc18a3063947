"""One model on several GPUs: the shapes that each device computes with.

*Tensor* parallel splits every layer: query heads, key/value heads, the MLP's inner width and the vocabulary go in equal
parts to the devices; the residual stream is whole on each. The row-parallel projections (o, down) and the split
embedding end in an all-reduce, the logits in an all-gather (M. Shoeybi et al., "Megatron-LM", arXiv 1909.08053). Fewer
key/value heads than devices are replicated. Rows then describe one device, and so do their parameters.

*Expert* parallel is tensor parallel but for routed experts: each device holds whole ones, in equal parts, computes what
its tokens ask of them, and the same all-reduce puts the outputs together. Every device sees all tokens, as attention is
not split by sequences, so that nothing is sent from device to device before it.

*Pipeline* parallel gives each device consecutive layers. One micro-batch passes all stages one after the other, so its
latency is the sum over all layers, as on one device, and ``devices - 1`` sends; no throughput gain of several
micro-batches in flight is claimed. Rows then describe the whole model; only memory is a matter of one device
(:func:`simulator.workload_batch.memory`).
"""

from __future__ import annotations

from dataclasses import replace

from simulator.errors import InputError
from simulator.models.config import Block, ModelConfig

PARALLEL: tuple[str, ...] = ("tensor", "expert", "pipeline")
"""Names of the ways to use several devices."""


def shard(model: ModelConfig, devices: int, parallel: str) -> ModelConfig:
    """The model as one of ``devices`` computes it; the whole in a pipeline. Refused where a width does not divide by
    the number of devices, or where a pipeline has more stages than layers.

    >>> from simulator.models.library import load_model
    >>> part = shard(load_model("llama-2-70b"), 16, "tensor")
    >>> part.heads, part.kv_heads, part.inner, part.vocab
    (4, 1, 1792, 2000)
    """
    if parallel not in PARALLEL:
        raise InputError(f"parallel {parallel!r} is unknown; expected one of {', '.join(PARALLEL)}")
    where = f"devices {devices}: {model.name} has"
    if parallel == "pipeline" and devices > model.layers:
        raise InputError(f"{where} {model.layers} layers; a pipeline takes at most one device a layer")
    if parallel == "pipeline" or devices == 1:
        return model

    def part(what: str, size: int) -> int:
        if size % devices:
            raise InputError(f"{where} {what} {size}; {parallel} parallel needs a number that divides it")
        return size // devices

    def of_block(block: Block) -> Block:
        heads, inner = part("attention heads", block.heads), part("MLP width", block.inner)
        few, many = sorted((block.kv_heads, devices))
        if few and many % few:
            raise InputError(f"{where} {block.kv_heads} key/value heads; one number must divide the other")
        share = replace(block, heads=heads, inner=inner, kv_heads=max(block.kv_heads // devices, int(block.heads > 0)))
        if not block.experts:
            return share
        if parallel == "expert":
            return replace(share, experts=part("experts", block.experts), active=block.active / devices)
        return replace(share, expert_inner=part("experts of a width of", block.expert_inner))

    return replace(model.each_block(of_block), vocab=-(-model.vocab // devices))  # engines pad its last part
