"""Read and check keys of a model's ``config.json``: :class:`Reader`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from simulator.arguments import shown
from simulator.errors import InputError

MAX_VALUE = 10_000_000
"""Largest accepted width, head count, vocabulary or layer count; it prevents overflow of products."""

MAX_POSITIONS = 1_000_000_000  # largest number of positions that a model may state; Llama-4-Scout states 10,485,760
MAX_LAYERS = 10_000  # largest number of decoder layers, which limits the size of tables per layer


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def is_list_of(value: Any, right: Callable[[Any], bool]) -> bool:
    """Return whether a value is a list whose items are all right."""
    return isinstance(value, list) and all(map(right, value))


@dataclass(frozen=True)
class Reader:
    """Keys of a configuration, or of an object in it; errors name the source and the key."""

    data: Mapping[str, Any]
    source: str
    place: str = ""  # place of the object in the file

    def fail(self, key: str, reason: str) -> InputError:
        return InputError(f"{self.source}: {self.place}{key}: {reason}")

    def value(self, key: str, default: Any, expected: str, right: Callable[[Any], bool]) -> Any:
        """Return a checked value; for null or a missing key the default, or an error without a default."""
        value = self.data.get(key)
        value = default if value is None else value
        if value is None:
            raise self.fail(key, f"missing; expected {expected}")
        if not right(value):
            raise self.fail(key, f"expected {expected}, got {shown(value)}")
        return value

    def integer(self, key: str, default: int | None = None, *, low: int = 1, high: int = MAX_VALUE) -> int:
        def right(value: Any) -> bool:
            return _is_number(value) and low <= value <= high and value == int(value)

        return int(self.value(key, default, f"an integer from {low} to {high}", right))

    def or_none(self, key: str, default: int | None = None) -> int:
        """Return a whole number, or 0 for null."""
        null = key in self.data and self.data[key] is None
        return 0 if null else self.integer(key, default, low=0)

    def number(self, key: str, default: float | None, high: float) -> float:
        def right(value: Any) -> bool:
            return _is_number(value) and 0 <= value <= high

        return float(self.value(key, default, f"a number from 0 to {high:g}", right))

    def flag(self, key: str, default: bool = False) -> bool:
        return bool(self.value(key, default, "true or false", lambda x: isinstance(x, bool)))

    def capped(self, key: str, absent: bool) -> bool:
        """Return whether a soft cap is set; null means no cap."""
        self.value(key, 1.0, "a positive number or null", lambda x: _is_number(x) and 0 < x < float("inf"))
        return self.data[key] is not None if key in self.data else absent

    def part(self, key: str) -> Reader:
        """Return an object in the configuration."""
        inside = self.value(key, None, "an object", lambda x: isinstance(x, Mapping))
        return Reader(inside, self.source, f"{self.place}{key}.")

    def parts(self, key: str, many: int) -> list[Reader]:
        """Return a list of ``many`` objects."""

        def right(value: Any) -> bool:
            return is_list_of(value, lambda item: isinstance(item, Mapping)) and len(value) == many

        found = self.value(key, None, f"a list of {many} objects, one per layer", right)
        return [Reader(inside, self.source, f"{self.place}{key}[{i}].") for i, inside in enumerate(found)]

    def rotary(self, key: str, default: float) -> float:
        """Return the rotated share of a head: from the key, or from ``rope_parameters`` (transformers 5)."""
        inside = self.data.get("rope_parameters")
        if key not in self.data and isinstance(inside, Mapping):
            return Reader(inside, self.source, f"{self.place}rope_parameters.").number(key, default, 1)
        return self.number(key, default, high=1)

    def layer_types(self, layers: int, known: tuple[str, ...]) -> list[str]:
        """Return the list ``layer_types``, one of ``known`` per layer; an empty list without the key."""
        types = self.data.get("layer_types")
        if types is None:
            return []
        if not isinstance(types, list) or len(types) != layers or any(t not in known for t in types):
            raise self.fail("layer_types", f"expected a list of {layers} of {' or '.join(known)}, got {shown(types)}")
        return types

    def windows(self, layers: int, default: int, windowed: Callable[[int], bool], used: bool = True) -> tuple[int, ...]:
        """Return the window of each layer: from the list ``layer_types``, else by the rule ``windowed``.

        A ``sliding_window`` of null means no window; if the key is missing, the default is used. The key is ignored
        unless ``used``."""
        window = self.or_none("sliding_window", default) if used else 0
        types = self.layer_types(layers, ("full_attention", "sliding_attention"))
        if not types:
            return tuple(window if windowed(layer) else 0 for layer in range(layers))
        if "sliding_attention" in types and not window:
            raise self.fail("sliding_window", "missing; expected an integer, as layer_types names sliding_attention")
        return tuple(window if t == "sliding_attention" else 0 for t in types)
