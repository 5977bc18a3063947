"""Compile the Triton kernels for GPUs that are not here, with every tile that their wrappers can
choose.

Triton lowers a kernel to a cubin without a GPU; its wheel brings ptxas and cuobjdump. :func:`cases`
enumerates what the functions of :mod:`calibration.devices.tile_shapes` return. :func:`figures`
compiles cases in a child process, because tests interpret kernels in theirs, and caches results by
kernel source, Triton's version and case.

``python tests/compiled_kernels.py`` compiles all cases and prints their figures.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from importlib.metadata import version
from itertools import product
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))

from calibration.devices import tile_shapes  # noqa: E402
from calibration.devices.tile_shapes import TileShape  # noqa: E402

SHARED_KB = {80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 120: 99}
"""Maximum shared memory per thread block by compute capability, KiB (CUDA C++ Programming Guide,
appendix "Compute Capabilities", table of technical specifications)."""
REGISTERS = 255
"""Maximum 32-bit registers per thread, all compute capabilities (the same table)."""
STACK = 32
"""Maximum bytes of stack per thread: ptxas may keep 8 registers there, in cases far below their
limit, to run more warps."""
ELEMENT_BYTES = {"bf16": 2, "fp16": 2, "fp32": 4}
POINTERS = dict.fromkeys(("x", "weight", "bias", "y", "gate", "up", "cos", "sin"), "")
POINTERS |= dict.fromkeys(("order", "users"), "*i64") | dict.fromkeys(
    ("count", "used", "chosen"), "*i32"
)
ROWS = [1 << power for power in range(14)]
WIDTHS = [1 << power for power in range(17)]


@dataclass(frozen=True)
class Case:
    """One kernel as a launch can compile it."""

    kernel: str
    dtype: str
    # "all": pointers and sizes are multiples of 16; "rows": not the columns of the result; "none"
    aligned: str
    tile: TileShape
    precision: str = ""  # precision of products
    flags: tuple[str, ...] = ()  # constants of the kernel that are true

    @property
    def operands(self) -> int:
        """Number of tiles that a step of the loop reads from memory; 0: there is no loop."""
        return {"_features": 2, "_columns": 2 + ("GATED" in self.flags)}.get(self.kernel, 0)

    @property
    def prefetched(self) -> bool:
        """Whether tiles can be copied to shared memory in the background: ``cp.async`` copies at
        least 4 bytes (PTX ISA), so not the 2-byte elements of rows without alignment."""
        return bool(self.operands) and (self.aligned != "none" or self.dtype == "fp32")


@dataclass(frozen=True)
class Figures:
    """Results of the compiler for a case: bytes of shared memory, registers per thread, bytes of
    stack (spilled registers), and buffers per operand in shared memory."""

    shared: int
    registers: int
    stack: int
    buffers: tuple[int, ...]


def cases() -> list[Case]:
    """Return all cases, in a fixed order."""
    return [*dict.fromkeys(_cases())]


def _cases() -> Iterator[Case]:
    formats = [("bf16", "ieee"), ("fp16", "ieee"), ("fp32", "ieee"), ("fp32", "tf32")]
    for (dtype, precision), aligned, rows in product(formats, ("all", "rows", "none"), ROWS):
        form = ELEMENT_BYTES[dtype], aligned
        for flags in ((), ("BIASED", "ADD")):
            tile = tile_shapes.gathered(rows, *form)
            yield Case("_columns", dtype, aligned, tile, precision, flags)
        for width in WIDTHS:
            for flags in ((), ("BIASED",), ("GATED",)):
                tile = tile_shapes.grouped_columns(rows, width, *form, "GATED" in flags)
                yield Case("_columns", dtype, aligned, tile, precision, flags)
            if aligned != "rows":  # its result has the columns of its weight
                yield Case(
                    "_features",
                    dtype,
                    aligned,
                    tile_shapes.grouped_features(rows, width, *form),
                    precision,
                )
    for dtype, aligned in product(ELEMENT_BYTES, ("all", "none")):
        for width in WIDTHS:
            if width <= tile_shapes.MOST_FEATURES:
                yield Case("_rms_norm", dtype, aligned, tile_shapes.normalised(width))
            if width <= tile_shapes.VECTOR_ELEMENTS // 2:
                yield Case("_rotary", dtype, aligned, tile_shapes.rotated(width))
        yield Case("_gated", dtype, aligned, TileShape(1, tile_shapes.VECTOR_ELEMENTS, 1))


@cache
def source(kernel: str) -> str:
    """Return the source of a kernel, decorator included, without Triton."""
    text = (ROOT / "calibration" / "devices" / "triton_kernels.py").read_text(encoding="utf-8")
    found = next(
        n for n in ast.parse(text).body if isinstance(n, ast.FunctionDef) and n.name == kernel
    )
    first = found.decorator_list[0].lineno - 1
    return "\n".join(text.splitlines()[first : found.end_lineno])


def digest(case: Case, capability: int) -> str:
    """Return the key of a result in the cache."""
    own = (
        Path(__file__)
        .read_text(encoding="utf-8")
        .split("def _compiled", 1)[1]
        .split("def _main", 1)[0]
    )
    text = "\n".join((source(case.kernel), own, version("triton"), repr(case), str(capability)))
    return hashlib.sha256(text.encode()).hexdigest()[:24]


def _path(cache: Path, case: Case, capability: int) -> Path:
    return cache / f"{digest(case, capability)}.json"


def figures(wanted: Sequence[tuple[int, Case]], cache: Path) -> list[Figures]:
    """Return the figures of pairs (compute capability, case), compiled in one child process if not
    in the cache.

    The child stores each result at once, so what is done survives an interruption.
    """
    cache.mkdir(parents=True, exist_ok=True)
    paths = [_path(cache, case, capability) for capability, case in wanted]
    if missing := [pair for pair, path in zip(wanted, paths, strict=True) if not path.is_file()]:
        asked = json.dumps([[capability, asdict(case)] for capability, case in missing])
        command = [sys.executable, "-W", "ignore", __file__, "--child", str(cache)]
        # Triton's cache would keep every form of every kernel
        with tempfile.TemporaryDirectory() as own:
            chosen = {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": own, "PYTHONPATH": str(ROOT)}
            environment = {**os.environ, **chosen}
            done = subprocess.run(
                command, env=environment, input=asked, capture_output=True, text=True, check=False
            )
        if done.returncode:
            raise RuntimeError(done.stderr[-3000:])
    read = (json.loads(path.read_text(encoding="utf-8")) for path in paths)
    return [Figures(**{**values, "buffers": tuple(values["buffers"])}) for values in read]


def problems(capability: int, case: Case, f: Figures) -> list[str]:
    """Return what a GPU cannot run, or would run slowly."""
    limits = (
        ("shared memory", SHARED_KB[capability] * 1024, f.shared),
        ("registers", REGISTERS, f.registers),
        ("bytes of stack", STACK, f.stack),
    )
    found = [
        f"{name}: expected at most {most}, got {value}"
        for name, most, value in limits
        if value > most
    ]
    if case.prefetched and (len(f.buffers) != case.operands or min(f.buffers) < 2):
        found.append(
            f"buffers: expected at least two for each of {case.operands} operands, got {f.buffers}"
        )
    return found


def _compiled(case: Case, capability: int) -> Figures:
    """Compile a case; runs in the child."""
    from importlib import import_module

    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel = getattr(import_module("calibration.devices.triton_kernels"), case.kernel)
    constants = {
        "BLOCK_M": case.tile.m,
        "BLOCK_N": case.tile.n,
        "BLOCK_K": case.tile.k,
        "PRECISION": case.precision,
    }
    constants = {
        name: constants.get(name, name in case.flags) for name in kernel.arg_names if name.isupper()
    }
    pointers = {name: kind or f"*{case.dtype}" for name, kind in POINTERS.items()}
    numbers = {"epsilon": "fp32"}
    types = {
        name: "constexpr" if name in constants else pointers.get(name) or numbers.get(name, "i32")
        for name in kernel.arg_names
    }
    odd = {*constants, *numbers, *(kernel.do_not_specialize or ())}
    odd |= {"all": set(), "rows": {"n", "width"}, "none": set(kernel.arg_names)}[case.aligned]
    aligned = {
        (i,): [["tt.divisibility", 16]]
        for i, name in enumerate(kernel.arg_names)
        if name not in odd
    }
    options = {"num_warps": case.tile.warps}
    made = triton.compile(
        ASTSource(kernel, types, constants, aligned),
        target=GPUTarget("cuda", capability, 32),
        options=options,
    )
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(made.asm["cubin"])
        file.flush()
        tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
        usage = subprocess.run(
            [tool, "-res-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    number = {name: int(value) for name, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", usage)}
    # operands copied in the background lie in buffers, buffers x rows x columns, allocated empty
    # before the loop
    element = {"bf16": "bf16", "fp16": "f16", "fp32": "f32"}[case.dtype]
    empty = re.findall(
        rf"ttg\.local_alloc : \(\) -> !ttg\.memdesc<(\d+)x\d+x\d+x{element},", made.asm["ttgir"]
    )
    return Figures(
        made.metadata.shared, number["REG"], number["STACK"] + number["LOCAL"], (*map(int, empty),)
    )


def _child(cache: Path, asked: Iterable[Any]) -> None:
    for capability, values in asked:
        case = Case(
            **{**values, "tile": TileShape(**values["tile"]), "flags": tuple(values["flags"])}
        )
        partial = cache / f"{digest(case, capability)}.{os.getpid()}"
        partial.write_text(json.dumps(asdict(_compiled(case, capability))), encoding="utf-8")
        partial.replace(partial.with_suffix(".json"))


def _main() -> None:
    parser = argparse.ArgumentParser(
        description="Compile every Triton kernel for six GPUs and print its figures."
    )
    parser.add_argument(
        "--cache", type=Path, default=ROOT / ".pytest_cache" / "d" / "compiled_kernels"
    )
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        _child(options.child, json.load(sys.stdin))
        return
    wanted = [(capability, case) for capability in SHARED_KB for case in cases()]
    for (capability, case), f in zip(wanted, figures(wanted, options.cache), strict=True):
        print(f"sm_{capability} {case}: {f}", *problems(capability, case, f), sep="\n  ")


if __name__ == "__main__":
    _main()
