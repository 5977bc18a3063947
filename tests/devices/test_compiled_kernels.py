"""Every tile that a Triton kernel can be launched with compiles for six GPUs, within their registers and shared memory.

The quick sample compiles about twelve cases, the slow one takes under a minute, and ``PRUNESIM_COMPILE=all`` compiles
all (about an hour on two cores; results are cached).
"""

from __future__ import annotations

import os
import random
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed")
if find_spec("triton") is None:  # not imported: that would fix whether this process interprets kernels
    pytest.skip("Triton is not installed; it comes with the extra kernels", allow_module_level=True)

from compiled_kernels import SHARED_KB, Case, Figures, cases, figures, page, problems  # noqa: E402
from pretended_cuda import kernels  # noqa: E402

from calibration.devices import skipping as tile_shapes  # noqa: E402
from calibration.devices.skipping import TileShape  # noqa: E402

CASES = cases()
MAIN = [case for case in CASES if case.operands]


@pytest.fixture(scope="module")
def cache(request: pytest.FixtureRequest) -> Path:
    assert request.config.cache is not None
    return Path(request.config.cache.mkdir("compiled_kernels"))


def _check(pairs: Sequence[tuple[int, Case]], cache: Path) -> None:
    done = [(*pair, f) for pair, f in zip(pairs, figures(pairs, cache), strict=True)]
    found = [f"sm_{arch} {case}: {problem}" for arch, case, f in done for problem in problems(arch, case, f)]
    assert not found, "\n".join(found)


def test_a_sample_compiles_for_six_gpus(cache: Path) -> None:
    """The largest tile of each kernel with a loop, on the GPUs with the least shared memory and the most."""
    largest = {case.kernel: case for case in MAIN if case.dtype == "bf16" and case.aligned == "all"}
    features = next(c for c in MAIN if c.kernel == "_features" and c.tile.k == 16 and c.aligned == "all")
    archs = list(SHARED_KB)
    pairs = [(archs[i % 6], case) for i, case in enumerate(largest.values())]
    pairs += [(arch, features) for arch in (80, 86, 89, 120)]  # had one buffer there
    pairs += [(archs[i % 6], case) for i, case in enumerate({c.kernel: c for c in CASES if not c.operands}.values())]
    _check(pairs, cache)


@pytest.mark.slow
@pytest.mark.skipif(os.environ.get("PRUNESIM_COMPILE") != "all", reason="takes an hour; set PRUNESIM_COMPILE=all")
@pytest.mark.parametrize("arch", SHARED_KB)
def test_every_case_compiles(arch: int, cache: Path) -> None:
    _check([(arch, case) for case in CASES], cache)


def test_cases_hold_every_tile_that_a_wrapper_chooses() -> None:
    """Sizes between the enumerated powers of two give no other tile."""
    known = {(case.kernel, case.dtype, case.aligned, "GATED" in case.flags, case.tile) for case in CASES}
    draw = random.Random(0)
    for _ in range(2000):
        rows, width, aligned = draw.randint(1, 1 << 13), draw.randint(1, 1 << 16), draw.choice(["all", "none"])
        dtype, size = draw.choice([("bf16", 2), ("fp16", 2), ("fp32", 4)])
        gated = draw.random() < 0.5
        tiles = {
            "_gathered": tile_shapes.gathered(rows, size, aligned),
            "_columns": tile_shapes.grouped_columns(rows, width, size, aligned, gated),
            "_features": tile_shapes.grouped_features(rows, width, size, aligned),
            "_rms_norm": tile_shapes.normalised(min(width, tile_shapes.MOST_FEATURES)),
        }
        for kernel, tile in tiles.items():
            assert (kernel, dtype, aligned, gated and kernel == "_columns", tile) in known


class Launches:
    """In a kernel's place: keeps the constants that a wrapper launches it with."""

    def __init__(self) -> None:
        self.seen: list[tuple[int, ...]] = []

    def __getitem__(self, grid: object) -> object:
        return lambda *args, num_warps: self.seen.append((*args[-4:-1], num_warps))


@pytest.mark.parametrize("rows", [1, 40, 200])
@pytest.mark.parametrize("width", [12, 48])
def test_wrappers_launch_the_tiles_of_their_functions(rows: int, width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    module, launches = kernels(), Launches()
    for name in ("_gathered", "_columns", "_features"):
        monkeypatch.setattr(module, name, launches)
    groups = 4
    x, weight = torch.zeros(rows, 48, device="meta"), torch.zeros(2 * groups * width, 48, device="meta")
    tiles = module.tiles_of(torch.zeros(rows, groups, dtype=torch.bool, device="meta"))
    module.gather_gemm(x, weight, torch.zeros(rows, dtype=torch.long, device="meta"), torch.zeros(1, device="meta"))
    y = module.grouped_columns(x, weight, tiles, gated=True)
    module.grouped_features(y, torch.zeros(groups * width, 48, device="meta"), tiles)
    wanted = [
        tile_shapes.gathered(rows, 4, "all"),
        tile_shapes.grouped_columns(rows, width, 4, "all" if width == 48 else "rows", True),
        tile_shapes.grouped_features(rows, width, 4, "all" if width == 48 else "none"),
    ]
    assert launches.seen == [(tile.m, tile.n, tile.k, tile.warps) for tile in wanted]


@pytest.mark.quick
def test_problems_name_what_exceeds_a_gpu() -> None:
    case = Case("_features", "bf16", "all", TileShape(64, 128, 64), "ieee")
    good = Figures(shared=90_000, registers=255, stack=0, buffers=(2, 2))
    assert problems(89, case, good) == []
    assert problems(89, case, Figures(110_000, 255, 0, (2, 2))) == [
        "shared memory: expected at most 101376, got 110000"
    ]
    assert problems(80, case, Figures(110_000, 255, 0, (2, 2))) == []
    assert problems(89, case, Figures(90_000, 255, 40, (1, 2))) == [
        "bytes of stack: expected at most 32, got 40",
        "buffers: expected at least two for each of 2 operands, got (1, 2)",
    ]


def test_the_page_has_a_row_for_each_gpu_and_kernel() -> None:
    text = page([(arch, case, Figures(2048, 64, 8, (2, 3))) for arch in SHARED_KB for case in MAIN[:1]])
    assert text.count("| sm_") == len(SHARED_KB)
    assert f"{6 * len(CASES) - 6} of {6 * len(CASES)} cases are not compiled" in text
    assert "| sm_89 | gather_gemm | 1 of 72 | 2.0 of 99 | 64 | 8 | 2 |" in text
