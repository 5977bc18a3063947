"""Read the keys of a model's ``config.json``: :class:`Reader`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from simulator.arguments import shown
from simulator.errors import InputError
from simulator.models.tables import read_names

_KEYS: Mapping[str, Mapping[str, Sequence[Any]]] = read_names("fields")
"""Kind of sublayer or object -> its fields -> keys of each, of which the first that is stated
counts, and default: a value, a usual field, or null if the key is needed."""

# values of keys by name: fields of the model and of its usual sublayers; "attentions" and "mlps"
# are the sublayers of each layer, if layers differ; "sublayers" are all those of each layer
ConfigFields = dict[str, Any]

Content = Mapping[str, Any]
"""Keys and values of a ``config.json``, or of an object in it."""

# largest width, number of heads or vocabulary; products of these numbers do not overflow
MAX_VALUE = 10_000_000
# largest number of positions that a model may state; Llama-4-Scout states 10,485,760
MAX_POSITIONS = 1_000_000_000
MAX_LAYERS = 10_000  # largest number of decoder layers, which limits the size of tables per layer


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


@dataclass(frozen=True)
class Reader:
    """Keys of a configuration, or of an object in it; errors name the source and the key."""

    data: Content
    source: str
    place: str = ""  # place of the object in the file
    # usual name of a key -> its name in this architecture
    names_of: Mapping[str, str] = field(default_factory=dict, repr=False)
    # keys that were looked up, whether the object has them or not
    known: set[str] = field(default_factory=set, compare=False, repr=False)
    # usual fields found so far
    values: ConfigFields = field(default_factory=dict, compare=False, repr=False)

    def __getitem__(self, name: str) -> Any:
        """Return a usual field."""
        return self.values[name]

    def get(self, name: str, default: Any = False) -> Any:
        """Return a usual field, which may be missing."""
        return self.values.get(name, default)

    def with_fields(self, **fields: Any) -> Reader:
        """Return the keys with other usual fields."""
        return replace(self, values=self.values | fields)

    def key(self, name: str) -> str:
        """Return the name of a key in the file; Transformers reads the usual name too."""
        own = self.names_of.get(name, name)
        return name if name in self.data and own not in self.data else own

    def has(self, key: str) -> bool:
        return self.key(key) in self.data

    def raw(self, key: str) -> Any:
        """Return a value as it is, None if the key is missing."""
        self.known.add(self.key(key))
        return self.data.get(self.key(key))

    def fail(self, key: str, reason: str) -> InputError:
        return InputError(f"{self.source}: {self.place}{self.key(key)}: {reason}")

    def value(self, key: str, default: Any, expected: str, right: Callable[[Any], bool]) -> Any:
        """Return a checked value; for null or a missing key the default, or an error without a
        default."""
        value = self.raw(key)
        value = default if value is None else value
        if value is None:
            raise self.fail(key, f"missing; expected {expected}")
        if not right(value):
            raise self.fail(key, f"expected {expected}, got {shown(value)}")
        return value

    def integer(
        self, key: str, default: int | None = None, *, low: int = 1, high: int = MAX_VALUE
    ) -> int:
        expected = f"an integer from {low} to {high}"
        if isinstance(self.raw(key), list):
            expected += " for all layers (a plan for --prune states sizes per layer)"
        return int(
            self.value(
                key, default, expected, lambda x: _is_number(x) and low <= x <= high and x == int(x)
            )
        )

    def layers(self) -> int:
        return self.integer("num_hidden_layers", high=MAX_LAYERS)

    def or_none(self, key: str, default: int | None = None) -> int:
        """Return a whole number, or 0 for null."""
        null = self.raw(key) is None and self.has(key)
        return 0 if null else self.integer(key, default, low=0)

    def number(self, key: str, default: float | None, high: float) -> float:
        expected = f"a number from 0 to {high:g}"
        return float(self.value(key, default, expected, lambda x: _is_number(x) and 0 <= x <= high))

    def flag(self, key: str, default: bool = False) -> bool:
        return bool(self.value(key, default, "true or false", lambda x: isinstance(x, bool)))

    def fields(self, kind: str) -> ConfigFields:
        """Return the fields of a kind of :data:`_KEYS`: flags, where the default is one, and whole
        numbers."""
        found: ConfigFields = {}
        for name, (*keys, default) in _KEYS[kind].items():
            value = self[default] if isinstance(default, str) else default
            for key in reversed(keys):
                read = self.flag if isinstance(value, bool) else self.integer
                value = read(key, value)
            found[name] = value
        return found

    def capped(self, key: str, absent: bool) -> bool:
        """Return whether a soft cap is set; null means no cap."""
        self.value(
            key, 1.0, "a positive number or null", lambda x: _is_number(x) and 0 < x < float("inf")
        )
        return self.raw(key) is not None if self.has(key) else absent

    def part(self, key: str) -> Reader:
        inside = self.value(key, None, "an object", lambda x: isinstance(x, Mapping))
        return Reader(inside, self.source, f"{self.place}{key}.", values=self.values)

    def text(self, key: str) -> str:
        return str(self.value(key, None, "a text", lambda x: isinstance(x, str)))

    def divisor(self, key: str, value: int, size: int, of: str) -> int:
        """Return a value of a key if it divides a size, which ``of`` names."""
        if size % value:
            raise self.fail(key, f"expected a divisor of {of} {size}, got {value}")
        return value

    def items(
        self,
        key: str,
        default: list[Any] | None,
        expected: str,
        right: Callable[[Any], bool],
        many: int | None = None,
    ) -> list[Any]:
        """Return a list of items that are ``right``, of a length if ``many`` is given."""

        def listed(value: Any) -> bool:
            return (
                isinstance(value, list)
                and many in (None, len(value))
                and all(right(item) for item in value)
            )

        return list(self.value(key, default, expected, listed))

    def names(self, key: str) -> list[str]:
        """Return a list of texts; an empty list without the key."""
        return self.items(key, [], "a list of names", lambda item: isinstance(item, str))

    def parts(self, key: str, many: int) -> list[Reader]:
        """Return a list of objects, one per layer."""
        expected = f"a list of {many} objects, one per layer"
        found = self.items(key, None, expected, lambda item: isinstance(item, Mapping), many)
        return [
            Reader(inside, self.source, f"{self.place}{key}[{i}].")
            for i, inside in enumerate(found)
        ]

    def numbers(self, key: str, default: Sequence[int], first: int = 0) -> set[int]:
        """Return a list of numbers of layers, of which the first has the number ``first``."""
        known = range(first, self["layers"] + first)
        expected = f"a list of layers from {known[0]} to {known[-1]}"

        def right(item: Any) -> bool:
            return isinstance(item, int) and item in known

        return set(self.items(key, [*default], expected, right))

    def integers(self, key: str, default: int | None, high: int = MAX_VALUE) -> list[int]:
        """Return a whole number per layer, from a list or from one number for all."""
        values = self.raw(key)
        layers = self["layers"]
        if not isinstance(values, list):
            return [self.integer(key, default, high=high)] * layers
        right = all(_is_number(x) and 1 <= x <= high and x == int(x) for x in values)
        if not right or len(values) != layers:
            expected = f"an integer from 1 to {high}, or a list of {layers} of them"
            raise self.fail(key, f"expected {expected}, got {shown(values)}")
        return [int(x) for x in values]

    def rotary(self, key: str, default: float, layer_type: str = "") -> float:
        """Return the rotated share of a head: from the key, or from ``rope_parameters``
        (transformers 5), which can hold an object per type of layer."""
        inside = self.raw("rope_parameters")
        if layer_type and isinstance(inside, Mapping):
            inside = inside.get(layer_type)
        if not self.has(key) and isinstance(inside, Mapping):
            return Reader(inside, self.source, f"{self.place}rope_parameters.").number(
                "partial_rotary_factor", default, 1
            )
        return self.number(key, default, high=1)

    def types(self, key: str, known: Sequence[str], usual: Callable[[int], str]) -> list[str]:
        """Return a list of one of ``known`` per layer; without the key by the rule ``usual``."""
        layers = self["layers"]
        if self.raw(key) is None:
            return [usual(layer) for layer in range(layers)]
        expected = f"a list of {layers} of {' or '.join(known)}"
        return self.items(key, None, expected, known.__contains__, layers)

    def of_kind(
        self, kind: str, other: str, usual: Callable[[int], bool], key: str = "layer_types"
    ) -> list[bool]:
        """Return whether each layer is of a kind, as a list of both kinds states, else by the rule
        ``usual``."""
        types = self.types(key, (other, kind), lambda layer: kind if usual(layer) else other)
        return [stated == kind for stated in types]

    def flags(self, key: str) -> list[bool]:
        """Return a list of 0 and 1 per layer; an empty list for another value."""
        if not isinstance(self.raw(key), list):
            return []
        layers = self["layers"]
        right = (0, 1).__contains__
        return [*map(bool, self.items(key, None, f"a list of {layers} of 0 or 1", right, layers))]

    def windows(
        self, default: int, windowed: Callable[[int], bool], used: bool = True
    ) -> tuple[int, ...]:
        """Return the window of each layer: from the list ``layer_types``, else by the rule
        ``windowed``.

        A ``sliding_window`` of null means no window; if the key is missing, the default is used.
        The key is ignored unless ``used``."""
        window = self.or_none("sliding_window", default) if used else 0
        slides = self.of_kind("sliding_attention", "full_attention", windowed)
        if self.raw("layer_types") and any(slides) and not window:
            raise self.fail(
                "sliding_window",
                "missing; expected an integer, as layer_types names sliding_attention",
            )
        return tuple(window if inside else 0 for inside in slides)
