"""Every tile that a Triton kernel can be launched with compiles for six GPUs, within their
registers and shared memory.

The quick sample compiles about twelve cases, the slow one takes under a minute, and
``PRUNESIM_COMPILE=all`` compiles all (about an hour on two cores; results are cached).
"""

from __future__ import annotations

import os
import random
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed")
# not imported: that would fix whether this process interprets kernels
if find_spec("triton") is None:
    pytest.skip("Triton is not installed; it comes with the extra kernels", allow_module_level=True)

from compiled_kernels import SHARED_KB, Case, cases, figures, problems  # noqa: E402

from calibration.devices import tile_shapes  # noqa: E402

CASES = cases()
MAIN = [case for case in CASES if case.operands]


@pytest.fixture(scope="module")
def cache(request: pytest.FixtureRequest) -> Path:
    return Path(request.config.cache.mkdir("compiled_kernels"))


def _check(pairs: Sequence[tuple[int, Case]], cache: Path) -> None:
    done = [(*pair, f) for pair, f in zip(pairs, figures(pairs, cache), strict=True)]
    found = [
        f"sm_{arch} {case}: {problem}"
        for arch, case, f in done
        for problem in problems(arch, case, f)
    ]
    assert not found, "\n".join(found)


def test_a_sample_compiles_for_six_gpus(cache: Path) -> None:
    """The largest tile of each kernel with a loop, on the GPUs with the least shared memory and the
    most."""
    largest = {case.kernel: case for case in MAIN if case.dtype == "bf16" and case.aligned == "all"}
    features = next(
        c for c in MAIN if c.kernel == "_features" and c.tile.k == 16 and c.aligned == "all"
    )
    gathered = next(c for c in MAIN if c.tile.m == 128 and "ADD" in c.flags)
    archs = list(SHARED_KB)
    pairs = [(archs[i % 6], case) for i, case in enumerate(largest.values())]
    pairs += [(arch, features) for arch in (80, 86, 89, 120)]  # had one buffer there
    pairs += [(86, gathered)]
    pairs += [
        (archs[i % 6], case)
        for i, case in enumerate({c.kernel: c for c in CASES if not c.operands}.values())
    ]
    _check(pairs, cache)


@pytest.mark.slow
@pytest.mark.skipif(
    os.environ.get("PRUNESIM_COMPILE") != "all", reason="takes an hour; set PRUNESIM_COMPILE=all"
)
@pytest.mark.parametrize("arch", SHARED_KB)
def test_every_case_compiles(arch: int, cache: Path) -> None:
    _check([(arch, case) for case in CASES], cache)


def test_cases_hold_every_tile_that_a_wrapper_chooses() -> None:
    """Sizes between the enumerated powers of two give no other tile."""
    known = {
        (case.kernel, case.dtype, case.aligned, "GATED" in case.flags, case.tile) for case in CASES
    }
    draw = random.Random(0)
    for _ in range(2000):
        rows, width, aligned = (
            draw.randint(1, 1 << 13),
            draw.randint(1, 1 << 16),
            draw.choice(["all", "none"]),
        )
        dtype, size = draw.choice([("bf16", 2), ("fp16", 2), ("fp32", 4)])
        gated = draw.random() < 0.5
        columns = tile_shapes.grouped_columns(rows, width, size, aligned, gated)
        tiles = [
            ("_columns", False, tile_shapes.gathered(rows, size, aligned)),
            ("_columns", gated, columns),
            ("_features", False, tile_shapes.grouped_features(rows, width, size, aligned)),
            ("_rms_norm", False, tile_shapes.normalised(min(width, tile_shapes.MOST_FEATURES))),
        ]
        for kernel, halves, tile in tiles:
            assert (kernel, dtype, aligned, halves, tile) in known
