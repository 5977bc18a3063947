"""Command lines and conditions near good ones; see ``targets``."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
from mutate import edit_bytes, few

# -- texts on the command line ----------------------------------------------------------------------------------------------------

_LINES: tuple[tuple[str, ...], ...] = (
    (
        "speedup",
        "llama-3.2-1b",
        "--hardware",
        "h100",
        "--family",
        "depth,width",
        "--sparsity",
        "0.1,0.25",
        "--phase",
        "decode",
        "--batch",
        "1",
        "--json",
    ),
    (
        "speedup",
        "llama-3.2-1b",
        "--hardware",
        "a100",
        "--family",
        "width",
        "--sparsity",
        "0.3",
        "--ideal",
        "--phase",
        "prefill",
        "--option",
        "align=64",
    ),
    (
        "explain",
        "llama-3.2-1b",
        "--hardware",
        "h100",
        "--family",
        "width",
        "--sparsity",
        "mlp=0.2",
        "--option",
        "inner=8100",
        "--phase",
        "prefill",
    ),
    (
        "explain",
        "llama-3.2-1b",
        "--hardware",
        "h100",
        "--family",
        "low_rank",
        "--sparsity",
        "0.3",
        "--option",
        "align=64",
        "--phase",
        "decode",
    ),
    ("gemm", "16,32", "4096", "11008", "--hardware", "h100", "--dtype", "bf16", "--json"),
    ("advise", "llama-3.2-1b", "--hardware", "h100", "--phase", "decode", "--target", "1.5", "--json"),
    ("models", "show", "llama-3.2-1b"),
    ("hardware", "show", "h100"),
    ("pareto", "llama-2-7b", "--hardware", "h100", "--metric", "zero-shot", "--phase", "decode"),
)

WORDS: tuple[str, ...] = (
    "",
    " ",
    "0",
    "-1",
    "1",
    "64",
    "1,64",
    "1,,2",
    ",",
    "nan",
    "inf",
    "-inf",
    "1e999",
    "9" * 400,
    "9" * 5000,
    "0.5",
    "0.999999",
    "1.0",
    "0.25,0.5",
    "\u0663",
    "\u00b2",
    "a=b",
    "=",
    "q=0.1",
    "mlp=0.5,attention=nan",
    "mlp=1e999",
    "inner=8810",
    "inner=-1",
    "inner=1e999",
    "align=0",
    "align=nan",
    "align=\u00b2",
    "align=1_0",
    "unit=layer",
    "rank=16,32",
    "rank=9999999999999999999999",
    "x" * 3000,
    "\u202e",
    "\x1b[31m",
    "a\nb",
    "\udcff",
    "../../etc/passwd",
    "/etc/passwd",
    "/dev/zero",
    "~nobody-there/x",
    "~",
    "generate",
    "prefill,decode",
    "bf16",
    "int4",
    "all",
    "cuda_graph",
    "true",
    "false",
    "0x10",
    "1_000",
    "1e3",
    "--",
    "-",
    "--json",
    "-1e-9",
    "2147483648",
)


PLAUSIBLE: tuple[str, ...] = (
    "1",
    "64",
    "1,8",
    "0.25",
    "0.1,0.5",
    "decode",
    "prefill",
    "prefill,decode",
    "bf16",
    "fp16",
    "a100",
    "h100,4090",
    "depth",
    "width",
    "depth,token",
    "align=16",
    "align=64",
    "512",
    "2048",
    "1.2",
    "mlp=0.5",
    "q=0.1,down=0.5",
    "4096",
    "cpu",
    "low_rank",
)


def command_line(rng: random.Random) -> list[str]:
    """A command line near a good one."""
    words = list(rng.choice(_LINES))
    for _ in range(few(rng, 2)):
        at = rng.randrange(1, len(words))
        kind = rng.randrange(8)
        if kind <= 4:
            values = [
                i for i in range(2, len(words)) if words[i - 1].startswith("--") and not words[i].startswith("--")
            ]
            words[rng.choice(values or [at])] = rng.choice(PLAUSIBLE if rng.random() < 0.6 else WORDS)
        elif kind == 5:
            words[at] = rng.choice(WORDS)
        elif kind == 6:
            del words[at]
        else:
            words[at] = edit_bytes(words[at].encode("utf-8", "surrogateescape"), rng, 2).decode(
                "utf-8", "surrogateescape"
            )
        if len(words) < 2:
            break
    return words


def make_where(rng: random.Random) -> bytes:
    good = b"speedup > 1.3 and batch == 1 or not (family in ['depth', 'width'] and 1 < sparsity / 0.5 <= 2)"
    parts = [
        b"(",
        b")",
        b"speedup",
        b"family",
        b"'depth'",
        b" and ",
        b" or ",
        b" not ",
        b" in ",
        b"[1]",
        b"==",
        b"<",
        b"1e400",
        b"9" * 400,
        b"lambda: 0",
        b"f'{1}'",
        b"(" * 300,
        b"-" * 500,
        b"ideal",
        b"true",
        b"/ 0",
        b"** 9",
        b"__import__",
        b"\x00",
        b"1j",
        b"...",
        b"'\\ud800'",
        b":=",
        b"not " * 400,
    ]
    out = bytearray(good)
    for _ in range(rng.randint(1, 3)):
        at = rng.randrange(len(out) + 1)
        out[at : at + rng.choice((0, 0, 3, 9))] = rng.choice(parts)
    return edit_bytes(bytes(out), rng) if rng.random() < 0.3 else bytes(out)


def read_where(path: Path) -> None:
    from simulator.predict.rows import COLUMNS
    from simulator.predict.where import parse_filter

    text = path.read_bytes().decode("utf-8", "surrogateescape")
    found = parse_filter(text, COLUMNS)
    table = {
        name: np.array(["depth"] * 3, dtype=object) if kind is str else np.arange(3).astype(kind)
        for name, kind in COLUMNS.items()
    }
    assert found(table.__getitem__, 3).shape == (3,)
