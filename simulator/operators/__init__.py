"""The operators of a forward pass, one file each; only :data:`OPERATORS` lists them."""

from __future__ import annotations

from collections.abc import Mapping

from simulator.operators.attention import DecodeAttention, PrefillAttention
from simulator.operators.base import POWER_CONSTANTS, RUNTIME_CONSTANTS, Constants, Operator
from simulator.operators.collective import Collective
from simulator.operators.delta_net import DeltaNet
from simulator.operators.elementwise import Elementwise
from simulator.operators.experts import Experts
from simulator.operators.gemm import Gemm
from simulator.operators.indexer import Indexer
from simulator.operators.short_conv import ShortConv
from simulator.operators.state_space import StateSpace

OPERATORS = (
    Gemm(),
    PrefillAttention(),
    DecodeAttention(),
    Elementwise(),
    Collective(),
    Experts(),
    DeltaNet(),
    Indexer(),
    StateSpace(),
    ShortConv(),
)

BY_CODE: Mapping[int, Operator] = {operator.code: operator for operator in OPERATORS}
"""Operators by their code in the column ``kind``."""

MOST_CODES = max(BY_CODE) + 1

_BY_SECTION = {
    section: constants
    for operator in OPERATORS
    for section, constants in operator.constants.items()
}
_WRITTEN_FIRST = (
    "gemm",
    "attention_prefill",
    "attention_decode",
    "mla_prefill",
    "mla_decode",
    "elementwise",
)
CONSTANTS: Mapping[str, Constants] = (
    {section: _BY_SECTION[section] for section in _WRITTEN_FIRST}
    | {"runtime": RUNTIME_CONSTANTS, "power": POWER_CONSTANTS}
    | _BY_SECTION
)
"""Constants of each section of a profile, in the order of a file."""

TITLES: Mapping[str, str] = {
    section: title
    for operator in sorted(OPERATORS, key=lambda operator: not operator.weighted)
    for section, title in zip(operator.constants, operator.titles)
}
"""Section of a profile -> name of its operators in notes; operators with weights come first."""
