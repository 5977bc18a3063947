"""Define how a server fills its steps: :class:`Schedule`, part of the YAML file of an engine.

Engines batch continuously: prompts that arrive while others decode are computed in the next step, up to a budget of
tokens. The defaults of an engine depend on the memory of the GPU.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from simulator.files.fields import ListField, NumberField, QuantityField, TextField, field_of

_COUNT = 2**31 - 1


@dataclass(frozen=True)
class StepLimit:
    """Most tokens and sequences of one step on GPUs of at least some memory."""

    memory: Annotated[float, QuantityField("B", 0.0, 1e15)]  # the limit applies from this memory on
    tokens: Annotated[int, NumberField(1, _COUNT, "8192", whole=True)]
    sequences: Annotated[int, NumberField(1, _COUNT, "256", whole=True)]
    not_on: Annotated[tuple[str, ...], ListField(TextField())] = ()  # GPUs whose names contain one of these


@dataclass(frozen=True)
class Schedule:
    """How a server fills its steps."""

    source: str
    limits: Annotated[tuple[StepLimit, ...], ListField(field_of(StepLimit))]  # by rising memory
    chunked: bool = False  # a prompt longer than the budget is computed in chunks
    decodes_count: bool = False  # each decoding sequence takes one token of the budget
    # tokens of prompts up to which prompts of neighbouring steps share one: requests that start together end together
    clustered: Annotated[int, NumberField(0, _COUNT, "1024", whole=True)] = 0
    note: str = ""  # on ``clustered``

    def limit(self, memory_bytes: float, name: str) -> StepLimit:
        """Return the limit of a GPU: the last one that applies.

        >>> limits = StepLimit(0.0, 2048, 256), StepLimit(7e10, 8192, 1024, ("a100",))
        >>> [Schedule("", limits).limit(8e10, name).tokens for name in ("a100_sxm", "h100_sxm")]
        [2048, 8192]
        """
        return [x for x in self.limits if memory_bytes >= x.memory and not any(part in name for part in x.not_on)][-1]
