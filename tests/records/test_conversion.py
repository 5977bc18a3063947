"""The conversion of activations is found in a table that times it together with the products, and
subtracted."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest

from calibration.records.importers import MOST, conversion_s, import_table
from simulator import load_hardware

LAUNCH, KERNEL, RATE, CHAIN = 2.5e-6, 3e-6, 1.2e12, 1e-9


def planted() -> tuple[np.ndarray, ...]:
    """Sizes, whether in 16 bits, time, and the conversion of a table whose narrow kernel has a long
    main loop."""
    sizes = np.array(
        list(itertools.product((1, 8, 64, 1024, 16384), (64, 128, 256, 4096), (512, 1024, 8192)))
    ).T
    m, n, k = np.concatenate([sizes, sizes], axis=1).astype(np.float64)
    wide = np.arange(len(m)) < sizes.shape[1]
    bytes_ = np.where(wide, 2.0, 1.0) * (n * k + m * (n + k))
    conversion = np.where(wide, 0.0, KERNEL + 3.0 * m * k / RATE)
    return (
        m,
        n,
        k,
        wide,
        LAUNCH + bytes_ / 3e12 + np.where(wide, 0.0, CHAIN * k) + conversion,
        conversion,
    )


def test_conversion_is_found_by_tokens_and_features() -> None:
    m, n, k, wide, seconds, conversion = planted()
    found = conversion_s(m, n, k, seconds, wide, 0.5)
    assert np.isnan(found[wide]).all()
    # a main loop of few microseconds that grows with k is the product's, except at the k of the
    # launches
    assert found[~wide] == pytest.approx(conversion[~wide] + CHAIN * 768, abs=0.4e-6)


def test_what_no_narrow_product_tells_is_unknown() -> None:
    m, n, k, wide, seconds, _ = planted()
    assert np.isnan(conversion_s(m, n, k, seconds, np.zeros_like(wide), 0.5)).all()
    few = (n > 256) | wide
    assert np.isnan(conversion_s(m[few], n[few], k[few], seconds[few], wide[few], 0.5)).all()
    lacks = ~((m == 64) & (k == 8192) & (n <= 256))
    found = conversion_s(m[lacks], n[lacks], k[lacks], seconds[lacks], wide[lacks], 0.5)
    at = (m == 64)[lacks] & (k == 8192)[lacks] & ~wide[lacks]
    assert np.isnan(found[at]).all()
    assert np.isfinite(found[~at & ~wide[lacks]]).all()


def test_an_import_keeps_products_alone(tmp_path: Path) -> None:
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    m, n, k, wide, seconds, conversion = planted()
    size = len(m)
    shared = {
        "framework": "TRTLLM",
        "version": "1",
        "op_name": "gemm",
        "kernel_source": "k",
        "device": "H100",
    }
    columns = {name: [value] * size for name, value in shared.items()}
    columns |= {
        "gemm_dtype": np.where(wide, "bfloat16", "fp8").tolist(),
        "latency": (1e3 * seconds).tolist(),
    }
    columns |= {name: x.astype(int).tolist() for name, x in (("m", m), ("n", n), ("k", k))}
    pq.write_table(pa.table(columns), path := tmp_path / "gemm_perf.parquet")
    result = import_table(path, hw=load_hardware("h100"))
    most = ~wide & (conversion + CHAIN * 768 > MOST * seconds)
    refused = result.refusals["over 65 % of the time is the conversion of activations"]
    assert len(refused) == pytest.approx(most.sum(), abs=3)
    r = result.records.of_dtype("fp8")
    full = {
        (a, b, c): t - v
        for a, b, c, w, t, v in zip(m, n, k, wide, seconds, conversion, strict=True)
        if not w
    }
    alone = np.array([full[shape] for shape in zip(r.m, r.n, r.k, strict=True)])
    assert r.seconds == pytest.approx(alone - CHAIN * 768, abs=0.4e-6)
