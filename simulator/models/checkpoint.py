"""Whether the tensors of a checkpoint are what its ``config.json`` says: :func:`check_tensors`."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

from simulator.errors import InputError
from simulator.models.config import ModelConfig
from simulator.models.headers import Tensor

_PARAMETER = re.compile(r"(?:^|\.)(?:layers|h|blocks)\.(\d{1,5})\.(.+\.(?:weight|bias))$")
_MASK = "attention.bias"  # a buffer that GPT-NeoX saved
_PACKED = (".qweight", ".weight_packed")  # GPTQ and AWQ, compressed-tensors
_FLOATS = ("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2")


def check_tensors(model: ModelConfig, tensors: Mapping[str, Tensor], folder: str | Path) -> None:
    """InputError, one line, where the decoder layers of a checkpoint hold other parameters than its configuration says:
    it was pruned in a way that the configuration cannot tell, and would be timed as the dense model.

    Weights that are packed, several in one element, are not looked into.

    >>> import simulator
    >>> tensors = {f"layers.{i}.mlp.weight": Tensor("F16", (64, 64)) for i in range(16)}
    >>> check_tensors(simulator.load_model("llama-3.2-1b"), tensors, "own")
    Traceback (most recent call last):
    simulator.errors.InputError: own: layers 0-15 hold 4,096 parameters each, 60,821,504 by the config.json; ...
    """
    layers = _layers(tensors)
    sizes = {i: sum(tensor.elements for tensor in layer.values()) for i, layer in sorted(layers.items())}
    wrong = [i for i, size in sizes.items() if i >= model.layers or size != model.layer_parameters]
    gone = [i for i in range(model.layers) if i not in sizes]
    if not layers or not (wrong or gone):
        return
    said = [f"layers {_runs(gone)} are missing"] if gone else []
    if wrong:
        one, like = wrong[0], next((i for i in sizes if i not in wrong), None)
        held = " to ".join(f"{size:,}" for size in sorted({f(sizes[i] for i in wrong) for f in (min, max)}))
        shape = _other_shape(layers[one], layers[like]) if like is not None else ""
        by_config = f"{model.layer_parameters:,} by the config.json"
        said.insert(0, f"layers {_runs(wrong)} hold {held} parameters each, {by_config}{shape}")
    advice = "its config.json alone is timed: correct it, or predict the pruning on the dense model (--family)"
    raise InputError(f"{folder}: {' and '.join(said)}; {advice}")


def _layers(tensors: Mapping[str, Tensor]) -> dict[int, dict[str, Tensor]]:
    """Parameters of each decoder layer by name; none where some are packed."""
    found: dict[int, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        inside = _PARAMETER.search(name)
        if inside and inside[2] != _MASK:
            if tensor.dtype not in _FLOATS:
                return {}
            found.setdefault(int(inside[1]), {})[inside[2]] = tensor
        elif name.endswith(_PACKED):
            return {}
    return found


def _other_shape(layer: Mapping[str, Tensor], like: Mapping[str, Tensor]) -> str:
    """The largest tensor that has another shape in a layer than in one like the configuration."""
    others = [name for name in like if name in layer and layer[name].shape != like[name].shape]
    if not others:
        return ""
    name = max(others, key=lambda name: like[name].elements)
    is_, was = (" x ".join(map(str, of[name].shape)) for of in (layer, like))
    return f" ({name} is {is_}, not {was})"


def _runs(numbers: Iterable[int]) -> str:
    """Sorted numbers with runs drawn together: 0, 4-29."""
    parts = []
    for _, run in itertools.groupby(enumerate(numbers), key=lambda pair: pair[1] - pair[0]):
        first, *_, last = [n for _, n in run] * 2
        parts.append(str(first) if first == last else f"{first}-{last}")
    return ", ".join(parts)
