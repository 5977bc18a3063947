"""Read the keys of a model's ``config.json`` (:class:`Reader`) by the rules of its ``model_type``
(:data:`ARCHITECTURES`).

An architecture is an entry of a table, a JSON file per family of architectures: fields of
:class:`Architecture`. Rules that do not fit into a table are functions of the reader and of the
fields found so far, in the module of the same name.
"""

from __future__ import annotations

from collections.abc import Mapping

from simulator.models.architectures import (
    classic,
    dense,
    experts,
    experts_by_layer,
    hybrids,
    latent,
    shared_caches,
)
from simulator.models.architectures.architecture import Architecture as Architecture
from simulator.models.architectures.architecture import Table
from simulator.models.architectures.per_layer import EXPERT_KEYS as EXPERT_KEYS
from simulator.models.architectures.per_layer import model_fields as model_fields
from simulator.models.architectures.per_layer import read_block as read_block
from simulator.models.architectures.per_layer import refuse_unknown as refuse_unknown
from simulator.models.architectures.reader import Reader as Reader
from simulator.models.tables import read_names

ARCHITECTURES: Table = {
    **classic.TABLE,
    **dense.TABLE,
    **experts.TABLE,
    **experts_by_layer.TABLE,
    **latent.TABLE,
    **hybrids.TABLE,
    **shared_caches.TABLE,
}
"""Supported architectures by the ``model_type`` of their decoder."""

_TYPES = read_names("types")
NESTED: Mapping[str, str] = _TYPES["nested"] | {name: f"{name}_text" for name in _TYPES["texts"]}
"""``model_type`` of models with further parts (vision) -> default architecture of their decoder,
``text_config``."""

# models whose older files have the decoder's keys at the top
FLAT = ("fuyu", "qwen2_vl", "qwen2_5_vl")

REFUSED: Mapping[str, str] = {
    kind: reason for reason, kinds in _TYPES["refused"].items() for kind in kinds
}
"""Model types that are not read -> reason. Transformers 5.24 maps all of them to a causal language
model."""
