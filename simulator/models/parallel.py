"""One model on several GPUs: what each device holds, and what the devices say to each other.

*Tensor* parallel splits every layer: query heads, key/value heads, the MLP's inner width and the vocabulary go in equal parts to
the devices; the residual stream is whole on each. The row-parallel projections (o, down) and the split embedding end in an
all-reduce, the logits in an all-gather (M. Shoeybi et al., "Megatron-LM", arXiv 1909.08053). Fewer key/value heads than devices
are replicated. Rows then describe one device, and so do their parameters.

*Pipeline* parallel gives each device consecutive layers. One micro-batch passes all stages one after the other, so its latency is the
sum over all layers, as on one device, and ``devices - 1`` sends; no throughput gain of several micro-batches in flight is claimed.
Rows then describe the whole model; only memory is a matter of one device (:mod:`simulator.memory`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from simulator.errors import InputError
from simulator.models.config import ModelConfig
from simulator.workload import Kind, Part

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
    whole = Shard(model.heads, model.kv_heads, model.inner, model.vocab)
    if devices == 1:
        return whole
    if parallel == "pipeline":
        if devices > model.layers:
            raise InputError(
                f"devices {devices}: {model.name} has {model.layers} layers; a pipeline takes at most one device a layer"
            )
        return whole
    for what, size in (("attention heads", model.heads), ("MLP width", model.inner), ("vocabulary", model.vocab)):
        if size % devices:
            raise InputError(
                f"devices {devices}: {model.name} has {what} {size}; tensor parallel needs a number that divides it"
            )
    few, many = sorted((model.kv_heads, devices))
    if many % few:
        raise InputError(
            f"devices {devices}: {model.name} has {model.kv_heads} key/value heads; one number must divide the other"
        )
    return Shard(
        model.heads // devices,
        max(1, model.kv_heads // devices),
        model.inner // devices,
        model.vocab // devices,
        devices,
    )


def all_reduce(shard: Shard, part: Part, tokens: int, hidden: int, element: float) -> list[dict[str, Any]]:
    """The row that sums partial results [tokens, hidden] over the devices; none on one device. Payload: that tensor's bytes."""
    return _collective(shard, "all_reduce", part, tokens, hidden, element)


def all_gather(shard: Shard, tokens: int, element: float) -> list[dict[str, Any]]:
    """The row that puts the logits together; none on one device. Payload: the bytes of the whole result, all devices' parts."""
    return _collective(shard, "all_gather", Part.HEAD, tokens, shard.vocab * shard.devices, element)


def _collective(shard: Shard, role: str, part: Part, tokens: int, width: int, element: float) -> list[dict[str, Any]]:
    if shard.devices == 1:
        return []
    payload = tokens * width * element
    return [
        {
            "kind": Kind.COLLECTIVE,
            "role": role,
            "part": part,
            "m": tokens,
            "n": width,
            "batch": shard.devices,
            "read_bytes": payload,
        }
    ]


def sends(devices: int, parallel: str, tokens: int, hidden: int, element: float) -> list[dict[str, Any]]:
    """The row of a pipeline's ``devices - 1`` sends of the residual stream [tokens, hidden], each between two devices."""
    if devices == 1 or parallel != "pipeline":
        return []
    # not part of any layer: they remain when layers are pruned
    row = {"kind": Kind.COLLECTIVE, "role": "send", "part": Part.HEAD, "m": tokens, "n": hidden, "batch": 2}
    return [row | {"read_bytes": tokens * hidden * element, "count": devices - 1}]
