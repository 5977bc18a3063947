"""Calibration of latent attention: planted structure and constants, rows held up, accuracy on the shipped tables."""

from __future__ import annotations

import numpy as np
import pytest
from operator_times import decode_time

from calibration.evidence.measured import evaluate_table
from calibration.evidence.sets import TableChoice
from calibration.fit.attention import AttentionFit, fit_attention
from simulator.hardware.library import load_hardware
from simulator.operators.attention import MLA_DECODE_CONSTANTS as CONSTANTS
from simulator.operators.attention import AttentionCalls, Geometry
from simulator.operators.base import Machine

HW = load_hardware("a100_sxm_80gb")


def planted(rows: int, form: dict[str, float]) -> AttentionFit:
    """Decode over a latent cache of a kernel of some structure."""
    rng = np.random.default_rng(3)
    heads, batch = 2.0 ** rng.integers(0, 8, rows), 2.0 ** rng.integers(0, 10, rows)
    length, one = np.round(2.0 ** rng.uniform(4, 15, rows)), np.ones(rows)
    shape = batch, one, length, heads, one, 576.0 * one
    geometry = Geometry(*shape, value_dim=512.0 * one, latent=True, warm=one)
    calls = AttentionCalls("decode", True, geometry, Machine.of(HW), Machine.of(HW).peak_flop_per_s)
    truth = {name: constant.default("ampere") for name, constant in CONSTANTS.items()} | form
    return AttentionFit(calls, calls.seconds(truth) * np.exp(0.01 * rng.normal(size=rows)), 2.0)


@pytest.mark.parametrize(("rows", "split_keys"), [(64.0, 128.0), (16.0, 1e6)])
def test_whether_a_kernel_splits_a_cache_is_found(rows: float, split_keys: float) -> None:
    c = planted(400, {"rows": rows, "split_keys": split_keys, "e_d": 0.7, "unit_bytes_per_s": 2e10})
    fit = fit_attention(c, "ampere", fold_by=("heads",))
    assert (fit.section["rows"], fit.section["split_keys"]) == (rows, split_keys)
    assert fit.section["e_d"] == pytest.approx(0.7, rel=0.05)
    assert fit.section["unit_bytes_per_s"] == pytest.approx(2e10, rel=0.05)
    assert fit.section.arrays["kinds"].tolist() == [[pytest.approx(np.log2(576)), 0, 0]]
    hw = HW.calibrated({("mla_decode", "bf16"): fit.section})
    g = c.calls.geometry
    t = decode_time(g.batch, g.kv_len, g.heads, g.kv_heads, g.head_dim, hw, value_dim=512, latent=True, cold=False)
    assert np.abs(t.seconds / c.seconds - 1.0).mean() < 0.02


@pytest.mark.parametrize(("operator", "mape"), [("mla_prefill", 0.075), ("mla_decode", 0.05)])
def test_accuracy_on_unseen_lengths_of_the_shipped_tables(operator: str, mape: float) -> None:
    result = evaluate_table(TableChoice(f"a100_sxm/{operator}/trtllm").load(), 400, 0, "lengths", fold_by=("lengths",))
    assert result["mape"] < mape
    assert result["coverage"] > 0.85
