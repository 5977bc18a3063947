"""Settings of a server: the defaults of its engine on a device, and options as users type them."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from simulator.arguments import Range, number
from simulator.capacity import DeviceMemory
from simulator.engines.engine import SERVER_NUMBERS, FrontEnd, Reserve, Sampler, load_engine
from simulator.errors import InputError, one_line, unknown
from simulator.hardware.profile import HardwareProfile
from simulator.units import parse_count, parse_number

_TOKENS = Range(1.0, 2.0**18, f"a whole number from 1 to {2**18:,}", True)
_NO_FRONT = FrontEnd(0.0, 0.0, 0.0, "")


@dataclass(frozen=True)
class Server:
    """How one replica of a server fills its steps (:class:`simulator.engines.engine.Schedule`)."""

    engine: str
    tokens: int  # most tokens of a step
    sequences: int  # most requests that run
    memory: float  # share of the device's memory (:attr:`Schedule.share_of`)
    share_of: str
    block: int  # tokens of a block of the cache
    chunked: bool
    mixes: bool
    prefix_cache: bool
    asynchronous: bool
    reserve: Reserve | None
    front: FrontEnd
    api_servers: int = 1  # processes of the front end
    sampler: Sampler | None = None  # None: sampling takes no time

    def __post_init__(self) -> None:
        number("tokens of a step", self.tokens, _TOKENS)

    @classmethod
    def of(
        cls,
        name: str,
        hw: HardwareProfile,
        options: str | Sequence[str] = (),
        sampled: bool = False,
    ) -> Server:
        """Return the server of an engine on a device, with options such as ``--max-num-seqs 64``;
        ``sampled``: its requests ask for top-p or top-k.

        InputError for an engine without a schedule, and for an option that the engine lacks."""
        engine = load_engine(name)
        schedule, limit = engine.schedule, engine.limit(hw.memory_bytes, hw.name)
        if schedule is None or limit is None:
            raise InputError(f"{engine.name}: expected an engine with a scheduler, such as vllm")
        server = cls(
            engine=engine.name,
            tokens=limit.tokens,
            sequences=limit.sequences,
            memory=engine.memory.value,
            share_of=schedule.share_of,
            block=schedule.block,
            chunked=schedule.chunked,
            mixes=schedule.mixes,
            prefix_cache=schedule.prefix_cache,
            # vLLM on a CPU waits for each step (measured: docs/cpu/vllm/server.json)
            asynchronous=engine.asynchronous and hw.architecture != "cpu",
            reserve=schedule.reserve,
            front=schedule.front or _NO_FRONT,
            sampler=schedule.sampler if sampled else None,
        )
        names = {}
        for name, field, value in _options(engine.name, schedule.options, options):
            server, names[field] = server.changed(field, value), name
        if "memory" not in names:
            memory = DeviceMemory.of(engine, hw, server.tokens)
            server = replace(server, memory=memory.share)
        if not server.mixes or server.sequences <= server.tokens:
            return server
        if "sequences" not in names:  # as vLLM does (EngineArgs)
            return replace(server, sequences=server.tokens)
        raise InputError(
            f"{names['sequences']}: expected at most the {server.tokens:,} tokens of a step, got"
            f" {server.sequences:,}"
        )

    def changed(self, field: str, value: Any) -> Server:
        """Return the server with another value of a field; ``conservative`` scales the reserve."""
        reserve = self.reserve
        if field != "conservative":
            return replace(self, **{field: value})
        if reserve is None:
            return self
        first = min(value * reserve.first, 1.0)
        least = first * reserve.least / reserve.first
        return replace(self, reserve=replace(reserve, first=first, least=least))


def _options(
    engine: str, known: Mapping[str, str], options: str | Sequence[str]
) -> Iterator[tuple[str, str, float]]:
    """Yield the name of each option as typed, the field that it sets, and the value."""
    try:
        words = shlex.split(options) if isinstance(options, str) else options
    except ValueError as error:
        raise InputError(f"options {one_line(str(options), 60)!r}: {error}") from None
    fields = {_plain(name): field for name, field in known.items()}
    rest = iter(words)
    for word in rest:
        name, has_value, text = word.partition("=")
        field = fields.get(_plain(name))
        if field is None:
            raise unknown(f"option of {engine}", name, known)
        if field in SERVER_NUMBERS:
            yield name, field, _number(name, field, text if has_value else next(rest, ""))
        elif has_value:
            raise InputError(f"{name}: expected no value, got {one_line(text, 40)!r}")
        else:
            yield name, field.removeprefix("no "), not field.startswith("no ")


def _plain(name: str) -> str:
    """Return an option in one spelling, as engines accept ``--max_num_seqs`` too."""
    return name.replace("_", "-")


def _number(name: str, field: str, text: str) -> float:
    parse, low, high = _PARSED.get(field, (parse_count, 1.0, 2.0**31 - 1))
    try:
        value = parse(text)
    except InputError as error:
        raise InputError(f"{name}: {error}") from None
    if not low <= value <= high:
        raise InputError(f"{name}: expected {low:g} to {high:g}, got {one_line(text, 40)}")
    return value


_PARSED = {"memory": (parse_number, 0.01, 1.0), "conservative": (parse_number, 0.01, 10.0)}
"""Fields that are not counts: how a value is read, and its range."""
