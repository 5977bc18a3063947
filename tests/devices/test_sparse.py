"""2:4 weights by planted functions of cuSPARSELt: right results, and one search for each number of
rows."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed")

from decoder_reference import CONFIG, TOKENS, run  # noqa: E402
from fakes.interpreted import CPU  # noqa: E402
from shaped import resized  # noqa: E402

from calibration.devices import Operator, Unsupported  # noqa: E402
from calibration.devices.operators import Arena, build, linear, sparse_weight  # noqa: E402
from calibration.runners.decoder.families import each_projection, prune_decoder, two_of_four  # noqa: E402
from calibration.runners.decoder.model import random_decoder  # noqa: E402


class Library:
    """Planted cuSPARSELt: dense arithmetic, rows in eights, and a note of every search and
    product."""

    def __init__(self) -> None:
        self.searched: list[int] = []
        self.products: list[tuple[Any, ...]] = []

    def search(self, packed: Any, dense: Any, *_: Any) -> tuple[int, int, int, int]:
        self.searched.append(dense.shape[1])
        return 3, 2, 1, 7

    def multiply(
        self,
        packed: Any,
        dense: Any,
        bias: Any,
        alpha: Any,
        out: Any,
        transpose_result: bool,
        *how: Any,
    ) -> Any:
        assert dense.shape[1] % 8 == 0
        assert transpose_result
        self.products.append(how)
        return torch.nn.functional.linear(dense.t(), packed, bias)


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> Library:
    planted = Library()
    monkeypatch.setattr(torch.backends.cusparselt, "is_available", lambda: True)
    monkeypatch.setattr(
        torch._C, "_cusparselt", SimpleNamespace(mm_search=planted.search), raising=False
    )
    monkeypatch.setattr(torch, "_cslt_compress", lambda weight: weight)
    monkeypatch.setattr(torch, "_cslt_sparse_mm", planted.multiply)
    return planted


@pytest.mark.parametrize("rows", [1, 7, 8, 30])
def test_a_product_is_that_of_the_dense_weight_by_the_fastest_algorithm(
    library: Library, rows: int
) -> None:
    weight, x, bias = two_of_four(torch.randn(32, 64)), torch.randn(2, rows, 64), torch.randn(32)
    packed = sparse_weight(weight)
    for _ in range(3):
        y = linear(x, packed, bias)
        torch.testing.assert_close(y, torch.nn.functional.linear(x, weight, bias))
    assert library.searched == [-(-2 * rows // 8) * 8]
    assert set(library.products) == {(3, 2, 1)}  # algorithm, split of K and its mode


def test_an_operator_is_searched_before_it_is_timed(library: Library) -> None:
    op = Operator("gemm_2to4", "fp32", m=16, n=32, k=64)
    launches = build(op, "cpu", Arena("cpu", 1e5, 1e8))
    assert launches.copies > 1
    assert library.searched == [16]
    for i in range(launches.copies):
        launches.launch(i)
    assert library.searched == [16]
    assert launches.how == ", cuSPARSELt by search [(3, 2, 1)]"


def test_a_decoder_searches_once_for_equal_shapes_and_equals_the_masked_one(
    library: Library,
) -> None:
    made = random_decoder(resized(CONFIG, qkv_bias=True), dtype="fp32")
    pruned = prune_decoder(replace(made, device=CPU), "semi_structured", 0.5)
    masked = each_projection(made, lambda i, role, p: replace(p, factors=(two_of_four(p.weight),)))
    torch.testing.assert_close(run(pruned), run(masked))
    kinds = len({tuple(p.factors[0].shape) for _, _, p in pruned.projections()})
    prefill_rows, decode_rows = TOKENS[:, :70].numel(), 8
    assert sorted(library.searched) == sorted([-(-prefill_rows // 8) * 8, decode_rows] * kinds)


def test_without_the_library_it_is_refused_by_name() -> None:
    if torch.backends.cusparselt.is_available():
        pytest.skip("this torch has cuSPARSELt")
    with pytest.raises(Unsupported, match="no cuSPARSELt"):
        sparse_weight(torch.zeros(32, 64))
