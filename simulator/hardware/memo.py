"""Values derived once from a profile and kept as long as it lives: a cost model's small calls depend on it."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any, Generic, TypeVar

T = TypeVar("T")


class PerObject(Generic[T]):
    """A memo by an object's identity and a key, dropped with the object.

    >>> class Thing:
    ...     pass
    >>> thing, memo = Thing(), PerObject[int]()
    >>> memo.get(thing, "a", lambda: 1), memo.get(thing, "a", lambda: 2)
    (1, 1)
    """

    def __init__(self) -> None:
        self._kept: dict[tuple[int, Any], tuple[weakref.ref[Any], T]] = {}

    def get(self, owner: Any, key: Any, make: Callable[[], T]) -> T:
        """The value kept for this owner and key, made on first use."""
        index = (id(owner), key)
        found = self._kept.get(index)
        if found is not None and found[0]() is owner:
            return found[1]
        value = make()
        self._kept[index] = (weakref.ref(owner, lambda _: self._kept.pop(index, None)), value)
        return value
