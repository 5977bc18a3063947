"""One model on several GPUs: the shapes that each device computes with.

*Tensor* parallel splits every layer: query heads, key/value heads, the MLP's inner width and the vocabulary go in equal
parts to the devices; the residual stream is whole on each. The row-parallel projections (o, down) and the split
embedding end in an all-reduce, the logits in an all-gather (M. Shoeybi et al., "Megatron-LM", arXiv 1909.08053). Fewer
key/value heads than devices are replicated. Rows then describe one device, and so do their parameters.

*Pipeline* parallel gives each device consecutive layers. One micro-batch passes all stages one after the other, so its
latency is the sum over all layers, as on one device, and ``devices - 1`` sends; no throughput gain of several
micro-batches in flight is claimed. Rows then describe the whole model; only memory is a matter of one device
(:mod:`simulator.kernels.memory`).
"""

from __future__ import annotations

from dataclasses import dataclass

from simulator.errors import InputError
from simulator.models.config import ModelConfig

SPLITS: tuple[str, ...] = ("tensor", "pipeline")
"""Names of the ways to use several devices."""


@dataclass(frozen=True)
class Shard:
    """The shapes one device computes with."""

    heads: int
    kv_heads: int
    inner: int
    vocab: int
    devices: int = 1  # devices that share each layer (1 in a pipeline)


def shard(model: ModelConfig, devices: int, parallel: str) -> Shard:
    """Shapes of one of ``devices``; the whole model's in a pipeline.

    Raises
    ------
    InputError
        Where a width does not divide by the number of devices, or a pipeline has more stages than layers.

    Examples
    --------
    >>> from simulator.models.library import load_model
    >>> shard(load_model("llama-2-70b"), 16, "tensor")
    Shard(heads=4, kv_heads=1, inner=1792, vocab=2000, devices=16)
    """
    if parallel not in SPLITS:
        raise InputError(f"parallel {parallel!r} is unknown; expected one of {', '.join(SPLITS)}")
    where = f"devices {devices}: {model.name} has"
    if parallel == "pipeline" and devices > model.layers:
        raise InputError(f"{where} {model.layers} layers; a pipeline takes at most one device a layer")
    if parallel == "pipeline" or devices == 1:
        return Shard(model.heads, model.kv_heads, model.inner, model.vocab)
    for what, size in (("attention heads", model.heads), ("MLP width", model.inner), ("vocabulary", model.vocab)):
        if size % devices:
            raise InputError(f"{where} {what} {size}; tensor parallel needs a number that divides it")
    few, many = sorted((model.kv_heads, devices))
    if many % few:
        raise InputError(f"{where} {model.kv_heads} key/value heads; one number must divide the other")
    kv_heads = max(1, model.kv_heads // devices)
    return Shard(model.heads // devices, kv_heads, model.inner // devices, model.vocab // devices, devices)
