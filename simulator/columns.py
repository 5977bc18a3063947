"""Define a frozen table of equal-length columns, the base of workloads and measured records.

A subclass is a frozen dataclass (``eq=False``) whose first fields are ``name: Array = column(dtype,
default)``; other fields apply to all rows. Columns of names are stored as codes, indices into
``CODES[column]``.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import Field, field, fields
from types import MappingProxyType
from typing import Any, ClassVar, TypeVar

import numpy as np

from simulator.arguments import MOST
from simulator.arrays import Array, plain
from simulator.display import Displayed, as_plain
from simulator.errors import InputError, unknown

T = TypeVar("T", bound="Table")


def column(dtype: type, default: Any) -> Any:
    """Declare a column by its NumPy type and default value."""
    return field(metadata={"column": (dtype, default)})


class Table(Displayed):
    """Read-only columns of equal length with declared types."""

    SCHEMA: ClassVar[Mapping[str, tuple[type, Any]]]  # column -> declared type and default
    CODES: ClassVar[Mapping[str, tuple[str, ...]]] = {}
    TITLE: ClassVar[str] = ""  # name of the table in errors

    def __init_subclass__(cls) -> None:
        declared = {
            n: f.metadata
            for n, f in vars(cls).items()
            if isinstance(f, Field) and "column" in f.metadata
        }
        cls.SCHEMA = MappingProxyType(
            {name: metadata["column"] for name, metadata in declared.items()}
        )

    def __post_init__(self) -> None:
        size = len(self)
        for name, (dtype, _) in self.SCHEMA.items():
            given = getattr(self, name)
            if not isinstance(given, np.ndarray) or given.dtype != dtype:
                given = self.coerced(name, given)
            values: Array = np.asarray(given, dtype=dtype)
            if values.shape != (size,):
                raise InputError(
                    f"{self.TITLE}column {name}: expected shape ({size},), got {values.shape}"
                )
            values = values.view()  # the caller's array stays writable
            values.flags.writeable = False
            object.__setattr__(self, name, values)

    def __len__(self) -> int:
        return len(getattr(self, next(iter(self.SCHEMA))))

    def _title(self) -> str:
        return f"{len(self):,} rows"

    def _columns(self) -> Mapping[str, Any]:
        """Return columns with names instead of codes; the code -1 is ""."""
        held = {name: getattr(self, name) for name in self.SCHEMA}
        return held | {
            name: np.array([*names, ""], dtype=object)[held[name]]
            for name, names in self.CODES.items()
        }

    def to_dict(self) -> dict[str, Any]:
        """Return columns as lists, with names instead of codes, and the fields of all rows."""
        shared = {f.name: getattr(self, f.name) for f in fields(self) if f.repr}  # type: ignore[arg-type]
        return dict(as_plain({**shared, **self._columns()}))

    def __eq__(self, other: object) -> bool:
        if type(self) is not type(other):
            return NotImplemented
        mine, theirs = vars(self), vars(other)
        return all(
            (
                np.array_equal(
                    mine[f.name], theirs[f.name], equal_nan=self.SCHEMA[f.name][0] is np.float64
                )
                if f.name in self.SCHEMA
                else mine[f.name] == theirs[f.name]
            )
            for f in fields(self)  # type: ignore[arg-type]  # subclasses are dataclasses
        )

    @classmethod
    def _of(cls: type[T], values: Mapping[str, Any], new: Iterable[str] | None = None) -> T:
        """Return a table of all field values without checks. ``new`` names the columns that no
        other table shares, by default all."""
        for name in cls.SCHEMA if new is None else new:
            values[name].setflags(write=False)
        out = object.__new__(cls)
        out.__dict__.update(values)
        return out

    @classmethod
    def coerced(cls, name: str, values: Any) -> Array:
        """Return ``values`` of the column ``name`` as numbers or codes; subclasses may check their
        range."""
        given = plain(values)
        return encode(name, given, cls.CODES) if given.dtype.kind in "UOT" else given

    @classmethod
    def _known(cls, names: Iterable[str]) -> None:
        if extra := sorted(set(names) - cls.SCHEMA.keys()):
            raise InputError(f"unknown columns {extra}; expected some of {sorted(cls.SCHEMA)}")

    @classmethod
    def from_columns(cls: type[T], *others: Any, size: int | None = None, **columns: Any) -> T:
        """Return a table of columns; scalars broadcast, missing columns have their default.
        ``others`` are fields of all rows. ``size`` is the number of rows, by default that of the
        longest column."""
        cls._known(columns)
        if size is None:
            size = max((plain(values).size for values in columns.values()), default=0)
        columns = {name: cls.coerced(name, values) for name, values in columns.items()}
        for name, values in columns.items():
            if values.shape not in ((), (1,), (size,)):
                raise InputError(
                    f"{cls.TITLE}column {name}: expected {size} values, got shape {values.shape}"
                )
        out = cls.filled(*others, size=size, **columns)
        out.__post_init__()  # checks the fields of all rows too
        return out

    @classmethod
    def filled(cls: type[T], *others: Any, size: int, **columns: Any) -> T:
        """Return a table of ``size`` rows of computed columns, without checks; ``others`` are
        fields of all rows."""
        values: dict[str, Any] = {}
        for name, (dtype, default) in cls.SCHEMA.items():
            whole: Array = np.empty(size, dtype)
            whole[:] = columns.get(name, default)
            values[name] = whole
        shared = [f for f in fields(cls) if f.name not in cls.SCHEMA]  # type: ignore[arg-type]
        values |= {f.name: f.default for f in shared} | {
            f.name: other for f, other in zip(shared, others)
        }
        return cls._of(values)

    @classmethod
    def from_rows(cls: type[T], rows: Iterable[Mapping[str, Any]], *others: Any) -> T:
        """Return a table of ``rows``, mappings from column to value; columns with codes accept
        names. ``others`` are fields of all rows."""
        rows = list(rows)
        return cls.from_columns(*others, size=len(rows), **cls._columns_of(rows))

    @classmethod
    def _columns_of(cls, rows: Sequence[Mapping[str, Any]]) -> dict[str, list[Any]]:
        """Return columns of numbers and codes; missing values are defaults."""
        cls._known(name for row in rows for name in row)
        columns: dict[str, list[Any]] = {}
        for i, row in enumerate(rows):
            for name, value in row.items():
                if name not in columns:
                    columns[name] = [cls.SCHEMA[name][1]] * len(rows)
                named = isinstance(value, str)
                columns[name][i] = _code(name, value, cls.CODES) if named else value
        return columns

    @classmethod
    def computed(cls: type[T], rows: Sequence[Mapping[str, Any]], *others: Any) -> T:
        """Return the table of :meth:`from_rows` for ``rows`` that this package computed; ``others``
        are fields of all rows. Values are checked, which takes longer, only if some are too large
        to be exact."""
        columns = cls._columns_of(rows)
        exact = all(max(values) <= MOST for values in columns.values())
        make = cls.filled if exact else cls.from_columns
        return make(*others, size=len(rows), **columns)

    @classmethod
    def concat(cls: type[T], parts: Iterable[T], **others: Any) -> T:
        """Return the rows of the tables ``parts`` in order; fields of all rows are ``others`` or
        those of the first."""
        tables = [vars(part) for part in parts]
        columns = {name: np.concatenate([table[name] for table in tables]) for name in cls.SCHEMA}
        return cls._of({**tables[0], **columns, **others})

    def take(self: T, index: Array) -> T:
        """Return the rows selected by a mask or an index array."""
        values = vars(self)
        return self._of({**values, **{name: values[name][index] for name in self.SCHEMA}})

    def replace(self: T, **changes: Any) -> T:
        """Return a copy with ``changes``: of columns (scalars broadcast) or of fields of all
        rows."""
        shape, new = (len(self),), changes.keys() & self.SCHEMA.keys()
        for name in new:
            given = changes[name]
            if not isinstance(given, np.ndarray):  # from a user; only computed columns are arrays
                given = self.coerced(name, given)
            values: Array = np.asarray(given, dtype=self.SCHEMA[name][0])
            if values.shape not in ((), (1,), shape):
                raise InputError(
                    f"{self.TITLE}column {name}: expected {shape[0]} values, got shape"
                    f" {values.shape}"
                )
            # a view: the caller's array stays writable
            changes[name] = (
                values.view() if values.shape == shape else np.broadcast_to(values, shape)
            )
        if extra := changes.keys() - vars(self).keys():
            raise InputError(
                f"unknown columns {sorted(extra)}; expected some of {sorted(self.SCHEMA)}"
            )
        return self._of({**vars(self), **changes}, new)


def encode(name: str, values: Array, codes: Mapping[str, tuple[str, ...]]) -> Array:
    names, inverse = np.unique(np.asarray(values, dtype=object).astype(str), return_inverse=True)
    return np.array([_code(name, str(n), codes) for n in names], dtype=np.int64)[inverse].reshape(
        np.shape(values)
    )


def _code(name: str, value: str, codes: Mapping[str, tuple[str, ...]]) -> int:
    if name not in codes:
        raise InputError(f"column {name}: expected a number, got {value!r}")
    try:
        return codes[name].index(value)
    except ValueError:
        raise unknown(name, value, codes[name]) from None
