"""The one seeded mutator of the tests: bytes of any format; JSON, YAML, CSV, Parquet and ``.npz`` by their structure.

The latter keep most files readable, so that what reads them gets past its first line. All take a ``random.Random``: the
same seed gives the same inputs. (Hypothesis draws hundreds of inputs a second; these are thousands, and binary.)
"""

from __future__ import annotations

import contextlib
import copy
import io
import json
import random
import re
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pytest

pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")

# -- what trips readers ------------------------------------------------------------------------------------------------

_WORDS = """
0 -1 1 2 16 64 132 0.5 0.25 25 -0.0 1e-320 1e-9 1e18 1e400 1e999 nan inf -inf .nan .inf infinity 0x10 010 1_0 +5 5. .5
1/2 1:30 --5 - true false yes null ~ maybe bf16 fp8 int4 depth width prefill gemm all llama-2-7b a100 attention_decode
a=b =1+1 unit=layer unit=2 align=\u00b2 align=--5 inner=9 %s {0} ../../etc/passwd /etc/passwd ~nobody-there/x
"""
# fmt: off
TEXTS: tuple[str, ...] = (
    *_WORDS.split(), "", " ", "a,b", "a\nb", "a\x00b", '"', "\u0663", "\u00b2", "\u00a0", "\u202eabc", "\x1b[31mred",
    "\ud800", "9" * 30, "9" * 400, "x" * 300, "x" * 3000,
)
"""Values as text: numbers that are none or no machine holds, digits that are not ASCII, control characters, paths."""

_MARKS = b"---\n|>\n|\t|&a |*a|!!python/name:os.system |: |- |? |<<: |{|}|[|]|'|\"|#|,|;|=|(|\\|\\ud800|\\u0000"
TOKENS: tuple[bytes, ...] = (
    *(text.encode("utf-8", "surrogatepass") for text in TEXTS if len(text) < 1000), *_MARKS.split(b"|"), b"|\n", b"\n",
    b"%YAML 1.1\n", b"\r",
    b"\r\n", b"\x00", b"\x7f", b"\xff", b"\xef\xbb\xbf", b"\xef\xbb", b"\xed\xa0\x80", b"\xe2\x80\xa8",
    b"[" * 60, b"{" * 60, b"(" * 30,
)
"""Spans of bytes: the texts, marks of YAML, JSON and CSV, ends of lines, broken UTF-8."""

NUMBERS: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 2, 3, 7, 16, 50, 1 << 31, 1 << 63, 1 << 64, 10**400, -(10**30), 0.5, -0.0, 1e-320,
    1e-9, 1e308, 1.5, 4096.0, float("nan"), float("inf"), float("-inf"),
)
NESTED: tuple[Any, ...] = ([], {}, [[]], {"": 0}, [1, "a", None], {"value": 1}, [0] * 50)
# fmt: on

_YAML = """
3.35 TB  3.35 TB/s  1 kB  1 GHz  "0.81"  'x'  []  {}  [1, 2]  {a: 1}  {value: 1}  [0.5, 0.25]  {width: {align: 64}}
{from: 0.1, to: 0.9, step: 0.1}  {from: 1, to: 1e9, times: 1.0000001}  {from: 1, to: 64, times: 2}  {width: {inner: 9}}
&a 1  *a  !!str 1  !!python/object/apply:os.system [ls]  |  >  ? x  <<: {a: 1}  @x  `x`  %  - 1  "\\ud800"  "\\0"  "\\e"
"""
YAML_VALUES = (*TEXTS, *re.split("  |\n", _YAML), "[" * 30)
YAML_LINES = ("---", "...", "%YAML 1.2", "# comment", "a: &a [x]", "b: *a", "unknown: 1", "- 1", "'", "\u2028")

# -- edits -------------------------------------------------------------------------------------------------------------

Edit = Callable[[Any, random.Random, Sequence[Any]], Sequence[Any]]
"""(a part, random numbers, all parts) -> the parts in its place."""


def few(rng: random.Random, most: int = 3) -> int:
    """How many edits: mostly one, so that many inputs get past the first checks."""
    return 1 if rng.random() < 0.6 else rng.randint(1, most)


def edit_parts(parts: Iterable[Any], rng: random.Random, edits: Mapping[Edit, int], most: int = 3) -> list[Any]:
    """The parts of a whole after one to ``most`` edits, each of one part, chosen by their weights."""
    out = list(parts)
    for edit in rng.choices(tuple(edits), tuple(edits.values()), k=few(rng, most)):
        if out:
            at = rng.randrange(len(out))
            out[at : at + 1] = edit(out[at], rng, out)
    return out


PART_EDITS: dict[Edit, int] = {
    lambda part, rng, parts: [part, part]: 1,
    lambda part, rng, parts: []: 1,
    lambda part, rng, parts: [rng.choice(parts)]: 1,
}
"""Given twice, removed, another in its place: of lines, rows, columns."""

_SPANS = (
    lambda span, rng, data: bytes([rng.randrange(256)]) + span[1:],
    lambda span, rng, data: bytes(byte ^ 1 << rng.randrange(8) for byte in span[:1]) + span[1:],
    lambda span, rng, data: b"",
    lambda span, rng, data: span + span,
    lambda span, rng, data: rng.choice(TOKENS) + span,
    lambda span, rng, data: rng.choice(TOKENS),
    lambda span, rng, data: rng.choice(TOKENS),
    lambda span, rng, data: data[(at := rng.randrange(len(data) + 1)) : at + len(span)],
)
_HEADS = (b"\xef\xbb\xbf", b"\xff\xfe", b"\x00", b"\x1f\x8b", b"PAR1", b"PK\x03\x04")
_FRAMES = (
    *[lambda data, rng: data[: rng.randrange(len(data) + 1)]] * 3,
    lambda data, rng: data.replace(b"\n", rng.choice((b"\r\n", b"\r"))),
    lambda data, rng: data.decode("utf-8", "replace").encode(rng.choice(("utf-16", "utf-32", "latin-1")), "replace"),
    lambda data, rng: rng.choice(_HEADS) + data,
    lambda data, rng: data + b"x" * rng.choice((1, 1000, 200_000)),
    lambda data, rng: data + data,
)


def edit_bytes(data: bytes, rng: random.Random, most: int = 4) -> bytes:
    """One to ``most`` edits: bytes flipped, spans cut, doubled, moved or replaced; seldom one of the whole."""
    for _ in range(few(rng, most)):
        if rng.random() < 1 / 9:
            data = rng.choice(_FRAMES)(data, rng)
        else:
            at, size = rng.randrange(len(data) + 1), rng.choice((1, 2, 5, 30, 100))
            data = data[:at] + rng.choice(_SPANS)(data[at : at + size], rng, data) + data[at + size :]
    return data


def seldom(data: bytes, rng: random.Random, share: float = 0.2) -> bytes:
    """Bytes that are mostly as they were."""
    return edit_bytes(data, rng, 2) if rng.random() < share else data


def scalar(rng: random.Random) -> Any:
    """A value to put in the place of any other."""
    return copy.deepcopy(rng.choice(rng.choice((NUMBERS, NUMBERS, TEXTS, NESTED))))


def json_tree(value: Any, rng: random.Random, most: int = 3) -> Any:
    """A copy of plain JSON data with one to ``most`` nodes replaced, removed, moved, renamed or nested deeply."""
    root = [copy.deepcopy(value)]
    for _ in range(few(rng, most)):
        places = list(_places(root))
        holder, key = rng.choice(places)
        kind = "replace" if holder is root else rng.choice(("replace",) * 4 + ("remove", "move", "rename", "nest"))
        if kind == "replace":
            holder[key] = scalar(rng)
        elif kind == "remove":
            del holder[key]
        elif kind == "move":
            other, at = rng.choice(places)
            holder[key] = copy.deepcopy(other[at])
        elif kind == "rename" and isinstance(holder, dict):
            holder[rng.choice((key.upper(), f"{key} ", f"_{key}", f"\u0131{key}", ""))] = holder.pop(key)
        else:
            for _ in range(rng.choice((1, 3, 30))):
                holder[key] = rng.choice(([holder[key]], {"a": holder[key]}))
    return root[0]


def _places(value: Any, depth: int = 0) -> Iterator[tuple[Any, Any]]:
    """(container, key) of every node below a container."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items if depth <= 40 else ():
        yield value, key
        yield from _places(inner, depth + 1)


def json_text(value: Any, rng: random.Random) -> bytes:
    """A JSON document near ``value``: its tree changed, seldom a key given twice, and then seldom its bytes edited."""
    data = json_tree(value, rng)
    text = json.dumps(data)
    if isinstance(data, dict) and data and rng.random() < 0.1:
        text = f"{text[:-1]}, {json.dumps(rng.choice(list(data)))}: {json.dumps(scalar(rng))}}}"
    if rng.random() < 0.02:  # deeper than any parser's stack
        text = text.replace(":", ": " + rng.choice(("[", '{"a":')) * 20_000, 1)
    return seldom(text.encode(), rng)


def _value(line: str, rng: random.Random, lines: Sequence[str]) -> list[str]:
    """The value of one key, in block or flow style."""
    values = list(re.finditer(r":( [^,}\]]*|$)", line))
    if not values:
        return [line, rng.choice(YAML_LINES)]
    chosen = rng.choice(values)
    return [f"{line[: chosen.start()]}: {rng.choice(YAML_VALUES)}{line[chosen.end() :]}"]


def _key(line: str, rng: random.Random, lines: Sequence[str]) -> list[str]:
    key, colon, value = line.partition(":")
    return [rng.choice((key.upper(), f"{key}s", f'"{key.strip()}"', f"? {key}", "")) + colon + value]


def _bomb(line: str, rng: random.Random, lines: Sequence[str]) -> list[str]:
    """Texts that grow in a careless reader: of aliases, of nesting."""
    laughs = [f"{y}: &{y} [*{x}, *{x}, *{x}]" for x, y in zip("abcdefgh", "bcdefghi")]
    return [*rng.choice((["a: &a [x, x]", *laughs], ["k: " + rng.choice("[{") * rng.choice((21, 500, 5000))])), line]


_LINE_EDITS: dict[Edit, int] = {
    **dict.fromkeys(PART_EDITS, 4),
    _value: 20,
    _key: 4,
    _bomb: 1,
    lambda line, rng, lines: [rng.choice(YAML_LINES), line]: 4,
    lambda line, rng, lines: [rng.choice(("  ", "\t", " ", "    ")) + line]: 2,
    lambda line, rng, lines: [line[rng.randint(1, 4) :]]: 2,
}


def yaml_text(text: str, rng: random.Random) -> bytes:
    """A YAML document near ``text``: values, keys, lines and indentation changed, seldom its bytes edited."""
    lines = edit_parts(text.split("\n"), rng, _LINE_EDITS)
    return seldom("\n".join(lines).encode("utf-8", "surrogatepass"), rng)


def _cells(row: list[str], rng: random.Random, rows: Sequence[Any]) -> list[list[str]]:
    """A cell replaced, put in or removed."""
    at, (cut, put) = rng.randrange(len(row) + 1), rng.choice(((1, 1),) * 7 + ((0, 1), (1, 0)))
    return [[*row[:at], *rng.choices(TEXTS, k=put), *row[at + cut :]]]


_ROW_EDITS: dict[Edit, int] = {_cells: 9, **PART_EDITS}
_COLUMN_EDITS: dict[Edit, int] = {
    **PART_EDITS,
    lambda column, rng, columns: [[column[0]] + [rng.choice(TEXTS)] * (len(column) - 1)]: 2,
}


def csv_text(text: str, rng: random.Random) -> bytes:
    """A CSV near ``text``: cells, columns, rows and separators changed, seldom its bytes edited."""
    table = [line.split(",") for line in text.rstrip("\n").split("\n")]
    by_rows = rng.random() < 0.9
    table = edit_parts(table, rng, _ROW_EDITS) if by_rows else [*zip(*edit_parts(zip(*table), rng, _COLUMN_EDITS))]
    if rng.random() < 0.7:
        table = [[f'"{c.replace(chr(34), chr(34) * 2)}"' if set(c) & set(',\n"') else c for c in row] for row in table]
    separator, end = rng.choice((*"," * 20, ";", "\t")), rng.choice((*"\n" * 20, "\r\n", "\r", "\n\n"))
    raw = end.join([*map(separator.join, table), *rng.choice(([], [""]))])
    return seldom(raw.encode("utf-8", "surrogatepass"), rng)


_ITEMS = (None, 0, -1, 1, 7, 1e-320, 1e300, float("nan"), float("inf"), 1 << 40, (1 << 62) + 1)
_CONSTANTS = (None, "x", b"\xff", [1, 2], {"a": 1}, True, 1e300, -1, "\u202e", 255, "bf16")
_TYPES = ("string", "float32", "int8", "uint64", "bool", "float16", "large_binary", "timestamp[us]")


def _spoilt(column: tuple[str, Any], rng: random.Random, columns: Sequence[Any]) -> list[tuple[str, Any]]:
    """Of another type, of one value, or with some items replaced."""
    name, array = column
    kind, number = rng.randrange(6), rng.choice((float, int))
    values = [rng.choice(_ITEMS) if rng.random() < 0.2 else value for value in array.to_pylist()]
    with contextlib.suppress(pa.ArrowException, ValueError, TypeError, OverflowError):  # not every column can be
        if kind == 0:
            array = array.cast(pa.type_for_alias(rng.choice(_TYPES)), safe=False)
        elif kind == 1:
            array = pa.array(list(map(str, array.to_pylist())))
        elif kind == 2:
            array = pa.array([rng.choice(_CONSTANTS)] * len(array))
        else:
            array = pa.array([None if value is None else number(value) for value in values])
    return [(name, array)]


_ARROW_EDITS: dict[Edit, int] = {
    **PART_EDITS,
    lambda column, rng, columns: [(rng.choice(("m", "x", "", column[0].upper())), column[1])]: 1,
    _spoilt: 6,
}


def parquet_bytes(table: Any, rng: random.Random) -> bytes:
    """A Parquet file near a pyarrow table: columns, rows or metadata changed, seldom its bytes edited."""
    metadata = dict(table.schema.metadata or {})
    columns = list(zip(table.column_names, table.columns))
    kind = rng.choice(("columns",) * 8 + ("rows", "metadata"))
    if kind == "columns":
        columns = edit_parts(columns, rng, _ARROW_EDITS)
    elif kind == "metadata":
        key = rng.choice(list(metadata) or [b"prunesim.records"])
        metadata[key] = json_text(json.loads(metadata.get(key, b"{}")), rng)
    table = pa.table([array for _, array in columns], names=[name for name, _ in columns], metadata=metadata)
    if kind == "rows":
        at = rng.randrange(table.num_rows)
        table = rng.choice((pa.concat_tables([table, table]), table[at:], table[at : at + 1], table[:0]))
    out = io.BytesIO()
    compression, dictionary = rng.choice(("zstd", "none", "snappy")), rng.random() < 0.5
    with contextlib.suppress(pa.ArrowException):  # a type that Parquet lacks
        pq.write_table(table, out, compression=compression, use_dictionary=dictionary)
    return seldom(out.getvalue(), rng, 0.35)


_VALUES = (0.0, -1.0, 1e300, -1e300, np.nan, np.inf, 1e-300, 0.5, 3e9, 17.0)
_ARRAYS = (
    lambda a, rng: a.astype(rng.choice(("f4", "i1", "u8", "f2", "?", ">f8", "c16", "U3", "O"))),
    lambda a, rng: a.reshape(rng.choice(((-1,), (1, -1), (-1, 1), (1, 1, -1, 1)))),
    lambda a, rng: np.zeros(rng.choice(((), (0,), (0, 3), (3, 0, 2), (1,) * 8)), a.dtype),
    lambda a, rng: rng.choice((np.tile(a.reshape(-1), 2), a.reshape(-1)[: rng.randrange(a.size + 1)])),
    *[lambda a, rng: np.where(np.arange(a.size).reshape(a.shape) == rng.randrange(a.size), rng.choice(_VALUES), a)] * 3,
)
"""Another type, shape or size, or one odd value."""

# fmt: off
_HEADERS = [
    repr({"descr": descr, "fortran_order": descr == "<c16", "shape": shape})
    for descr, shape in (
        ("<f8", (99999999999, 9999999999)), ("|O", (1,)), ("<f8", (-1,)), ("<V8", (1,)), ("<c16", ()),
        ("<f2", (0, 999999999)), ("<u7", (1,)), ("<i8", (1,) * 8),
    )
] + ["__import__('os').getcwd()", "(" * 64]
# fmt: on
_FILES = (
    lambda raw, rng: rng.choice((b"", raw + b"more", raw[: rng.randrange(len(raw))])),
    lambda raw, rng: edit_bytes(raw, rng),
    lambda raw, rng: b"\x93NUMPY\x01\x00v\x00" + rng.choice(_HEADERS).encode().ljust(117) + b"\n" + raw[128:],
)
"""The file of an array: cut short, too long, with a header that lies."""
_PACKINGS = (zipfile.ZIP_STORED,) * 8 + (zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA)


def npz_bytes(arrays: Mapping[str, Any], rng: random.Random) -> bytes:
    """An ``.npz`` near these arrays: some arrays changed, seldom their files or names, or the bytes of all."""
    changed = rng.sample(list(arrays), min(few(rng), len(arrays)))
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", rng.choice(_PACKINGS)) as archive, np.errstate(all="ignore"):
        for name, array in arrays.items():
            file = io.BytesIO()
            np.save(file, rng.choice(_ARRAYS)(array, rng) if name in changed else array)
            raw = file.getvalue()
            if name == changed[0] and rng.random() < 0.2:
                raw, name = rng.choice(_FILES)(raw, rng), rng.choice((*[name] * 4, "../../x", "/etc/x"))
            archive.writestr(f"{name}.npy", raw)
    return seldom(out.getvalue(), rng, 0.3)
