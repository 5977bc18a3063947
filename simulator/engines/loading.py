"""Define what a stock engine loads and runs of a pruned checkpoint: :class:`Loading`, :class:`Width`,
:class:`Sparse24`, :class:`DynamicKernels`.

They are parts of the YAML file of an engine. :data:`FEATURES` names what a checkpoint can have beyond a dense model.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Annotated

from simulator.codes import DTYPES
from simulator.files.fields import Flag, Number, SourceName, String, Strings, Text

FEATURES: Mapping[str, str] = MappingProxyType(
    {
        "uniform": "layers of equal shapes, fewer or narrower than in the dense model",
        "heads": "query heads that do not add up to the hidden size",
        "groups": "query heads that are not a multiple of the key/value heads",
        "sublayers": "layers without attention or without an MLP",
        "layer_inner": "MLP widths that differ by layer",
        "layer_kv_heads": "key/value heads that differ by layer",
        "layer_heads": "query heads that differ by layer",
        "layer_experts": "experts that differ by layer",
        "expert_choice": "experts that a map, or a number per token, selects after the router",
        "linear": "a linear layer instead of attention or an MLP",
        "low_rank": "low-rank factors of weights",
        "residual_projections": "matrices in the residual stream (SliceGPT)",
        "routers": "routers that skip tokens, heads or channels",
        "custom_code": "modelling code in the repository of the model",
    }
)
"""Feature of a checkpoint -> its description."""


Formats = tuple[Annotated[str, Text(DTYPES)], ...]
_MULTIPLE = Number(1, 65536, "128", whole=True)


@dataclass(frozen=True)
class Loading:
    """Whether a stock engine loads checkpoints with a feature."""

    value: Flag
    source: SourceName
    how: String  # what config.json must state, or why the engine does not load the feature
    model_types: Strings = ()  # only these; none: all
    multiple: Annotated[int, _MULTIPLE] = 1  # MLP widths that it can describe


@dataclass(frozen=True)
class Width:
    """Number of elements of which the kernels of a weight format need a multiple."""

    multiple: Annotated[int, _MULTIPLE]
    source: SourceName
    required: Flag = False  # whether the engine refuses other widths
    note: String = ""


LIBRARIES: tuple[str, ...] = ("cusparselt", "cutlass", "tensorrt", "marlin")
"""Libraries of 2:4 kernels. Marlin reads weights alone in fewer bits, the others compute in the weights' format."""


@dataclass(frozen=True)
class Sparse24:
    """2:4 kernels of one library, as an engine uses it."""

    formats: Formats  # formats of weights
    source: SourceName
    searched: Flag = True  # it times the plans of the library and takes the fastest for a shape; else one plan for all
    on: Strings = ()  # architectures with these kernels; none: all
    note: String = ""


@dataclass(frozen=True)
class DynamicKernels:
    """How an engine runs a dynamic pruning family."""

    how: String
    source: SourceName
    on: Strings = ()  # architectures with these kernels; none: all
