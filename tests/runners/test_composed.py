"""Operators that the decoder puts together, timed alone and as they are predicted."""

from __future__ import annotations

from types import MappingProxyType

import pytest

torch = pytest.importorskip("torch")

from decoder_reference import CONFIG  # noqa: E402

from calibration.runners import composed  # noqa: E402
from simulator.hardware.library import load_hardware  # noqa: E402
from simulator.hardware.profile import Fitted  # noqa: E402

pytestmark = pytest.mark.quick


def test_what_families_add_runs_and_is_predicted(monkeypatch: pytest.MonkeyPatch) -> None:
    runs: list[object] = []
    monkeypatch.setattr(composed, "seconds_of", lambda run: float(len(runs.append(run()) or runs)))
    found = list(composed.measured(CONFIG, 128, 0.5))
    assert [(family, phase) for family, phase, _ in found] == [
        ("sparse_attention", "prefill"), ("sparse_attention", "decode"), ("kv_cache", "prefill"),
        ("dynamic_depth", "prefill"), ("dynamic_depth", "decode"),
    ]  # fmt: skip
    assert [seconds for *_, seconds in found] == [1.0, 2.0, 3.0, 4.0, 5.0]
    assert runs[0].shape == (1, CONFIG.heads, 128, CONFIG.head_dim)  # type: ignore[attr-defined]


def test_a_prediction_is_of_what_is_added_and_follows_the_host() -> None:
    cpu = load_hardware("cpu")
    key = "runtime", "*"
    runtime = cpu.sections[key]
    slow = {**runtime.constants, "host_op_s": Fitted(runtime.constants["host_op_s"].value + 1e-6)}
    slower = cpu.calibrated(MappingProxyType({**cpu.sections, key: runtime.__class__(slow, status="calibrated")}))
    usual, more = (composed.predicted(CONFIG, 128, 0.5, "dynamic_depth", "decode", hw) for hw in (cpu, slower))
    assert more - usual == pytest.approx(2 * 5 * 1e-6)  # two sublayers, five launches beside the router's product
