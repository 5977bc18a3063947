"""The one seeded mutator of the tests: bytes of any format, and JSON, YAML, CSV, Parquet and ``.npz`` by their structure.

Use :func:`edit_bytes` for any format, ``json_text``, ``yaml_text``, ``csv_text``, ``parquet_bytes`` and ``npz_bytes`` for edits that keep
a file readable, so that what reads it gets past its first line. All take a ``random.Random``: the same seed gives the same inputs.
"""

from __future__ import annotations

import copy
import io
import json
import random
import zipfile
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

TOKENS: tuple[bytes, ...] = (
    *(b"&a ", b"*a", b"!!python/name:os.system ", b"---\n", b"\t", b"\xff", b"\x00", b": ", b"- ", b"{", b"]", b'"'),
    *(b"'", b"#", b"010", b"1:30", b".nan", b"1e999", b"yes", b"null", b"9" * 400, b"\xe2\x80\xa8", b"? ", b"|\n"),
    *(b">\n", b"<<: ", b"%YAML 1.1\n", b"\r", b"\r\n", b"\\", b"-", b"nan", b"inf", b"-1", b"0", b"1e400", b","),
    *(b"\n", b"1e18", b"0x10", b"true", b"fp8", b"\xef\xbb\xbf", b"\xef\xbb", b"\xed\xa0\x80", "\u0663".encode()),
    *("\u00b2".encode(), "\u202e".encode(), "\u00a0".encode(), b"\x1b[31m", b"\x7f", b"[" * 60, b"{" * 60),
    *(b"../../etc/passwd", b"\\ud800", b"\\u0000", b"-0.0", b"1_0", b";", b"=", b"(" * 30, b"%s", b"{0}"),
)
"""What trips readers of text: marks of YAML, ends of lines, numbers that are none, digits that are not ASCII, control characters."""

SCALARS: tuple[Any, ...] = (
    *(None, True, False, 0, -1, 1, 2, 3, 7, 16, 64, 1 << 31, 1 << 63, 1 << 64, 10**400, -(10**30), 0.5, -0.0, 1e-320),
    *(1e-9, 1e308, 1.5, 4096.0, float("nan"), float("inf"), float("-inf"), "", " ", "0", "1", "16", "nan", "1e999"),
    *("bf16", "depth", "a\nb", "a\x00b", "\ud800", "\u0663", "\u00b2", "--5", "-", "../../etc/passwd", "/etc/passwd"),
    *("~nobody-there/x", "x" * 3000, "\u202eabc", "\x1b[31mred", [], {}, [[]], {"": 0}, [1, "a", None], {"value": 1}),
    [0] * 50,
)
"""Values put in the place of any other."""

CELLS: tuple[str, ...] = (
    *("", " ", "0", "-1", "1", "nan", "inf", "-inf", "1e400", "1e-320", "1e18", "9" * 30, "0x10", "1_0", "true"),
    *("maybe", "bf16", "fp8", "depth", "width", "0.5", "0.25", "25", "\u0663", "\u00b2", "--5", "a=b", "unit=layer"),
    *("unit=2", "align=\u00b2", "align=--5", '"', '"a', "a,b", "a\nb", "\x00", "\u202e", "\x1b[31m", "x" * 300),
    *("\u00a0", "llama-2-7b", "attention_decode", "gemm", "2.5", "1e-6", "+5", "5.", ".5", "1:30", "1/2", "=1+1"),
)
"""Cells put in the place of any other in a CSV."""


def few(rng: random.Random, most: int = 3) -> int:
    """How many edits: mostly one, so that many inputs get past the first checks.

    >>> sorted({few(random.Random(i), 3) for i in range(50)})
    [1, 2, 3]
    """
    return 1 if rng.random() < 0.6 else rng.randint(1, most)


def edit_bytes(data: bytes, rng: random.Random, most: int = 4) -> bytes:
    """One to ``most`` edits: bytes flipped, spans cut, doubled, moved or replaced by :data:`TOKENS`; seldom the end cut off or a new frame.

    >>> edit_bytes(b"a: 1", random.Random(1)) == edit_bytes(b"a: 1", random.Random(1)) != b"a: 1"
    True
    """
    out = bytearray(data)
    for _ in range(few(rng, most)):
        at, size = rng.randrange(len(out) + 1), rng.choice((1, 2, 5, 30, 100))
        kind = rng.randrange(9)
        if kind == 0 and at < len(out):
            out[at] = rng.randrange(256)
        elif kind == 1 and at < len(out):
            out[at] ^= 1 << rng.randrange(8)
        elif kind == 2:
            del out[at : at + size]
        elif kind == 3:
            out[at:at] = out[at : at + size]
        elif kind == 4:
            out[at:at] = rng.choice(TOKENS)
        elif kind in (5, 6):
            out[at : at + size] = rng.choice(TOKENS)
        elif kind == 7:
            other = rng.randrange(len(out) + 1)
            out[at : at + size] = out[other : other + size]
        else:
            out = _framed(out, rng)
    return bytes(out)


def _framed(out: bytearray, rng: random.Random) -> bytearray:
    """Edits of the whole: cut short, another end of line, another encoding, a mark at its head, something long at its end."""
    kind = rng.randrange(8)
    if kind < 3:
        return out[: rng.randrange(len(out) + 1)]
    if kind == 3:
        return out.replace(b"\n", rng.choice((b"\r\n", b"\r")))
    if kind == 4:
        return bytearray(out.decode("utf-8", "replace").encode(rng.choice(("utf-16", "utf-32", "latin-1")), "replace"))
    if kind == 5:
        return bytearray(rng.choice((b"\xef\xbb\xbf", b"\xff\xfe", b"\x00", b"\x1f\x8b", b"PAR1", b"PK\x03\x04"))) + out
    if kind == 6:
        return out + b"x" * rng.choice((1, 1000, 200_000))
    return out + out


# -- JSON -------------------------------------------------------------------------------------------------------------------------


class Pairs(list[tuple[str, Any]]):
    """Members of an object as they will be written: a key may occur twice."""


def json_tree(value: Any, rng: random.Random, most: int = 3, scalars: Sequence[Any] = SCALARS) -> Any:
    """A copy of plain JSON data with one to ``most`` nodes changed: replaced, removed, renamed, wrapped, nested deeply, given twice."""
    root = [copy.deepcopy(value)]
    for _ in range(few(rng, most)):
        places = list(_places(root))
        holder, key = rng.choice(places)
        kind = rng.randrange(8)
        if kind <= 3 or holder is root:
            holder[key] = copy.deepcopy(rng.choice(scalars))
        elif kind == 4:
            del holder[key]
        elif kind == 5:
            other, at = rng.choice(places)
            holder[key] = copy.deepcopy(other[at]) if other is not root else rng.choice(scalars)
        elif kind == 6 and isinstance(holder, dict):
            holder[rng.choice((str(key).upper(), f"{key} ", f"_{key}", "\u0131" + str(key), ""))] = holder.pop(key)
        else:
            deep: Any = holder[key]
            for _ in range(rng.choice((1, 3, 30))):
                deep = [deep] if rng.random() < 0.5 else {"a": deep}
            holder[key] = deep
    return root[0]


def _places(value: Any, depth: int = 0) -> Any:
    """(container, key) of every node below a container."""
    if depth > 40:
        return
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in list(items):
        yield value, key
        yield from _places(inner, depth + 1)


def json_text(value: Any, rng: random.Random) -> bytes:
    """A JSON document near ``value``: its tree changed, seldom a key given twice, and then seldom its bytes edited."""
    data = json_tree(value, rng)
    if isinstance(data, dict) and data and rng.random() < 0.1:
        key = rng.choice(list(data))
        text = _dumps(data)[:-1] + f", {json.dumps(key)}: {_dumps(rng.choice(SCALARS))}}}"
    else:
        text = _dumps(data)
    if rng.random() < 0.02:  # deeper than any parser's stack
        text = text.replace(":", ": " + rng.choice(("[", '{"a":')) * 20_000, 1)
    raw = text.encode("utf-8", "surrogatepass")
    return edit_bytes(raw, rng, 2) if rng.random() < 0.25 else raw


def _dumps(value: Any) -> str:
    return json.dumps(value, ensure_ascii=True, indent=None)


# -- YAML -------------------------------------------------------------------------------------------------------------------------

YAML_VALUES: tuple[str, ...] = (
    *("", "null", "~", "yes", "0", "-1", "1", "010", "1:30", "1e999", ".nan", ".inf", "9" * 400, "3.35 TB"),
    *("3.35 TB/s", "1 kB", "0.81", "1e-6", '"0.81"', "'x'", "[]", "{}", "[1, 2]", "{a: 1}", "{value: 1}", "&a 1"),
    *("*a", "!!str 1", "!!python/object/apply:os.system [ls]", "|", ">", "? x", "<<: {a: 1}", "@x", "`x`", "%"),
    *("- 1", "../../etc/passwd", "/etc/passwd", '"\\ud800"', '"\\0"', '"\\e[31m"', "\u0663", "\u00b2", "bf16", "all"),
    *("depth", "prefill", "a100", "llama-2-7b", "0.5", "[0.5, 0.25]", "{from: 0.1, to: 0.9, step: 0.1}"),
    *("{from: 1, to: 1e9, times: 1.0000001}", "{width: {align: 64}}", "{width: {inner: 9}}", "true", "x" * 3000),
    *("[" * 30, "{from: 1, to: 64, times: 2}", "1 GHz", "132", "64", "2", "infinity", "-0.0", "1_0", "nan"),
)


def yaml_text(text: str, rng: random.Random) -> bytes:
    """A YAML document near ``text``: values, lines and indentation changed, aliases and deep nesting put in, seldom its bytes edited."""
    lines = text.split("\n")
    for _ in range(few(rng)):
        at = rng.randrange(len(lines))
        kind = rng.randrange(12)
        line = lines[at]
        if kind <= 4 and ":" in line:  # the value of one key, in block or flow style
            colons = [i for i, c in enumerate(line) if c == ":" and line[i + 1 : i + 2] in (" ", "")]
            if colons:
                place = rng.choice(colons) + 1
                end = min(
                    (i for i in (line.find(",", place), line.find("}", place), line.find("]", place)) if i > 0),
                    default=len(line),
                )
                lines[at] = f"{line[:place]} {rng.choice(YAML_VALUES)}{line[end:]}"
        elif kind == 5:
            lines.insert(at, line)
        elif kind == 6:
            del lines[at]
            lines = lines or [""]
        elif kind == 7:
            lines[at] = (
                rng.choice(("  ", "\t", " ", "    ")) + line if rng.random() < 0.5 else line[rng.randint(1, 4) :]
            )
        elif kind == 8:
            other = rng.randrange(len(lines))
            lines[at], lines[other] = lines[other], line
        elif kind == 9:
            lines.insert(
                at,
                rng.choice(
                    ("---", "...", "%YAML 1.2", "# comment", "a: &a [x]", "b: *a", "unknown: 1", "- 1", "'", "\u2028")
                ),
            )
        elif kind == 10 and ":" in line:
            key, colon, value = line.partition(":")
            lines[at] = rng.choice((key.upper(), f"{key}s", f'"{key.strip()}"', f"? {key}", "")) + colon + value
        elif rng.random() < 0.2:
            lines = _bomb(rng).split("\n") + lines
    raw = "\n".join(lines).encode("utf-8", "surrogatepass")
    return edit_bytes(raw, rng, 2) if rng.random() < 0.25 else raw


def _bomb(rng: random.Random) -> str:
    """Texts that grow in a careless reader."""
    if rng.random() < 0.5:
        return "a: &a [x, x]\n" + "".join(f"{y}: &{y} [*{x}, *{x}, *{x}]\n" for x, y in zip("abcdefgh", "bcdefghi"))
    return "k: " + rng.choice("[{") * rng.choice((21, 500, 5000))


# -- CSV --------------------------------------------------------------------------------------------------------------------------


def csv_text(text: str, rng: random.Random, cells: Sequence[str] = CELLS) -> bytes:
    """A CSV near ``text``: cells, columns and rows changed, removed, doubled or moved, other separators, seldom its bytes edited."""
    table = [line.split(",") for line in text.rstrip("\n").split("\n")]
    separator, end = ",", "\n"
    for _ in range(few(rng)):
        row = rng.choice(table)
        at = rng.randrange(len(row)) if row else 0
        kind = rng.randrange(14)
        if kind <= 6 and row:
            row[at] = rng.choice(cells)
        elif kind == 7:
            table.insert(rng.randrange(len(table) + 1), list(row))
        elif kind == 8 and len(table) > 1:
            table.remove(row)
        elif kind == 9:
            row[at:at] = [rng.choice(cells)]
        elif kind == 10 and row:
            del row[at]
        elif kind == 11:  # a whole column: removed, doubled, or all its cells one value
            value, how = rng.choice(cells), rng.randrange(3)
            for line in table:
                if at < len(line):
                    line[at : at + 1] = (
                        [] if how == 0 else [line[at]] * 2 if how == 1 else [line[at] if line is table[0] else value]
                    )
        elif kind == 12:
            other = rng.choice(table)
            table[table.index(row)], table[table.index(other)] = other, row
        else:
            separator, end = rng.choice((",", ";", "\t")), rng.choice(("\n", "\r\n", "\r", "\n\n"))
    quote = rng.random() < 0.7
    lines = [separator.join(_quoted(c) if quote else c for c in line) for line in table]
    raw = (end.join(lines) + end * rng.randrange(2)).encode("utf-8", "surrogatepass")
    return edit_bytes(raw, rng, 2) if rng.random() < 0.2 else raw


def _quoted(cell: str) -> str:
    return '"' + cell.replace('"', '""') + '"' if any(c in cell for c in ',\n"') else cell


# -- Parquet ----------------------------------------------------------------------------------------------------------------------


def parquet_bytes(table: Any, rng: random.Random) -> bytes:
    """A Parquet file near a pyarrow table: columns dropped, renamed, doubled, cast or spoilt; metadata changed; or bytes edited."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    for _ in range(few(rng)):
        names = table.column_names
        kind = rng.randrange(10)
        at = rng.randrange(len(names)) if names else 0
        try:
            if kind == 0 and names:
                table = table.drop_columns([names[at]])
            elif kind == 1 and names:
                table = table.rename_columns(
                    [rng.choice(("m", "x", "", n.upper())) if i == at else n for i, n in enumerate(names)]
                )
            elif kind == 2 and names:
                table = table.append_column(names[at], table.column(at))
            elif kind <= 5 and names:
                table = table.set_column(at, names[at], _spoilt(table.column(at), rng))
            elif kind == 6 and names:
                table = table.set_column(at, names[at], _constant(rng, table.num_rows))
            elif kind == 7:
                table = table.slice(rng.randrange(table.num_rows + 1), rng.choice((0, 1, 3)))
            elif kind == 8:
                table = pa.concat_tables([table, table])
            else:
                table = table.replace_schema_metadata(_metadata(table.schema.metadata or {}, rng))
        except (pa.ArrowException, ValueError, TypeError, OverflowError, KeyError):
            continue  # this table cannot be changed so
    out = io.BytesIO()
    try:
        pq.write_table(
            table, out, compression=rng.choice(("zstd", "none", "snappy")), use_dictionary=rng.random() < 0.5
        )
    except (pa.ArrowException, ValueError, TypeError):
        return b"PAR1"
    raw = out.getvalue()
    return edit_bytes(raw, rng) if rng.random() < 0.35 else raw


def _spoilt(column: Any, rng: random.Random) -> Any:
    """A column with some values replaced, or of another type."""
    import pyarrow as pa

    values = column.to_pylist()
    if rng.random() < 0.4:
        kinds = (
            *(pa.string(), pa.float32(), pa.int8(), pa.uint64(), pa.bool_(), pa.float16(), pa.large_binary()),
            *(pa.timestamp("us"), pa.decimal128(38, 3)),
        )
        kind = rng.choice(kinds)
        return pa.array([str(v) for v in values]) if kind == pa.string() else column.cast(kind, safe=False)
    for _ in range(rng.randint(1, 5)):
        if values:
            values[rng.randrange(len(values))] = rng.choice(
                (None, 0, -1, 1, 7, 1e-320, 1e300, float("nan"), float("inf"), 1 << 40, (1 << 62) + 1)
            )
    if rng.random() < 0.5:
        return pa.array([None if v is None else float(v) for v in values])
    return pa.array([None if v is None else int(v) for v in values], pa.int64())


def _constant(rng: random.Random, size: int) -> Any:
    """A column of one odd value."""
    import pyarrow as pa

    odd: tuple[Any, ...] = (None, "x", b"\xff", [1, 2], {"a": 1}, True, 1e300, -1, "\u202e", 255, "bf16")
    return pa.array([rng.choice(odd)] * size)


def _metadata(metadata: dict[bytes, bytes], rng: random.Random) -> dict[bytes, bytes]:
    """Metadata with one value changed: as JSON where it is that, else as bytes."""
    out = dict(metadata) or {b"prunesim.records": b"{}"}
    key = rng.choice(list(out))
    try:
        out[key] = json_text(json.loads(out[key]), rng)
    except (ValueError, RecursionError):
        out[key] = edit_bytes(out[key], rng)
    return out


# -- .npz -------------------------------------------------------------------------------------------------------------------------

_HEADERS: tuple[bytes, ...] = (
    b"{'descr': '<f8', 'fortran_order': False, 'shape': (99999999999, 9999999999), }",
    b"{'descr': '|O', 'fortran_order': False, 'shape': (1,), }",
    b"{'descr': '<f8', 'fortran_order': False, 'shape': (-1,), }",
    *(b"{'descr': '<V8', 'fortran_order': False, 'shape': (1,), }", b"__import__('os').getcwd()"),
    b"{'descr': '<c16', 'fortran_order': True, 'shape': (), }",
    *(b"{'descr': '<f2', 'fortran_order': False, 'shape': (0, 999999999), }", b"(" * 64),
    b"{'descr': '<u7', 'fortran_order': False, 'shape': (1,), }",
    b"{'descr': '<i8', 'fortran_order': False, 'shape': (1,1,1,1,1,1,1,1), }",
)


def npz_bytes(arrays: dict[str, Any], rng: random.Random) -> bytes:
    """An ``.npz`` near these arrays: shapes, types and values changed, headers forged, entries renamed, bytes edited."""
    items: dict[str, bytes] = {}
    changed = rng.sample(list(arrays), min(few(rng), len(arrays)))
    for name, array in arrays.items():
        items[f"{name}.npy"] = _npy(_array(np.asarray(array), rng) if name in changed else np.asarray(array))
    if rng.random() < 0.2:
        name = rng.choice(list(items))
        raw = items.pop(name)
        forged: Callable[[], bytes] = rng.choice(
            (
                lambda: b"",
                lambda: raw[: rng.randrange(len(raw))],
                lambda: raw + b"more",
                lambda: edit_bytes(raw, rng),
                lambda: b"\x93NUMPY\x01\x00v\x00" + rng.choice(_HEADERS).ljust(117) + b"\n" + raw[128:],
            )
        )
        items[name if rng.random() < 0.8 else rng.choice(("../../x.npy", "/etc/x.npy", "x"))] = forged()
    out = io.BytesIO()
    with zipfile.ZipFile(
        out, "w", rng.choice((zipfile.ZIP_STORED,) * 8 + (zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA))
    ) as archive:
        for name, raw in items.items():
            archive.writestr(name, raw)
    raw = out.getvalue()
    return edit_bytes(raw, rng) if rng.random() < 0.3 else raw


def _npy(array: Any) -> bytes:
    out = io.BytesIO()
    np.lib.format.write_array(out, array, allow_pickle=True)
    return out.getvalue()


def _array(array: Any, rng: random.Random) -> Any:
    kind = rng.randrange(7)
    if kind == 0:
        return array.astype(rng.choice(("f4", "i1", "u8", "f2", "?", ">f8", "c16", "U3", "O")))
    if kind == 1:
        return array.reshape(-1)[: rng.randrange(array.size + 1)]
    if kind == 2:
        return array.reshape(rng.choice(((-1,), (1, -1), (-1, 1), (1, 1, -1, 1))))
    if kind == 3:
        return np.zeros(rng.choice(((), (0,), (0, 3), (3, 0, 2), (1,) * 8)), array.dtype)
    if kind == 4:
        return np.concatenate([array.reshape(-1), array.reshape(-1)])
    out = np.array(array, dtype=np.float64)
    if out.size:
        out.reshape(-1)[rng.randrange(out.size)] = rng.choice(
            (0.0, -1.0, 1e300, -1e300, float("nan"), float("inf"), 1e-300, 0.5, 3e9, 17.0)
        )
    with np.errstate(all="ignore"):
        return out.astype(array.dtype) if kind == 5 and array.dtype.kind == "f" else out
