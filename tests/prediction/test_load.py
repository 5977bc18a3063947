"""Requests that arrive at a service: rates, GPUs, costs and ratios with intervals."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from simulator import serve
from simulator.errors import InputError
from simulator.figures.load import loads_of, timeline_of
from simulator.prediction.load import Interval, LoadPoint, LoadService
from simulator.prediction.load_sentences import best_points, of_loads

pytestmark = pytest.mark.quick
LOAD: dict[str, Any] = {"seq": 1024, "new_tokens": 128, "requests": 200, "length_sd": 0.5}


def loads(model: str = "llama-3.1-8b", hardware: str = "h100", **more: Any) -> list[LoadService]:
    return list(serve(model, hardware, **{**LOAD, **more}).loads)


def points(**more: Any) -> tuple[LoadPoint, ...]:
    (service,) = loads(**more)
    return service.points


def test_zero_sparsity_changes_nothing() -> None:
    dense, same = points(rate=10.0, ttft_s=0.3, family="width", sparsity=0.0)
    for name in ("latency_ratio", "rate_ratio"):
        assert same.numbers[name] == pytest.approx((1.0, 1.0, 1.0))
    for name, number in dense.numbers.items():
        assert same.numbers[name] == pytest.approx(number, rel=1e-9), name


def test_errors_that_dense_and_pruned_share_cancel_in_their_ratio() -> None:
    dense, pruned = points(rate=10.0, prune="depth 0.25")
    ratio = pruned.numbers["latency_ratio"]
    assert 1.2 < ratio.lower < ratio.value < ratio.upper < 1.5
    of_time = pruned.numbers["request_mean"]
    assert np.log(ratio.upper / ratio.lower) < 0.5 * np.log(of_time.upper / of_time.lower)
    assert dense.numbers["ttft_p50"] < dense.numbers["ttft_p90"] < dense.numbers["ttft_p99"]


def test_the_largest_rate_is_where_limits_stop_to_hold() -> None:
    (service,) = loads(rate=10.0, ttft_s=0.2, tpot_s=0.02)
    (point,), (model,) = service.points, service.models
    largest = point.numbers["largest_rate"]
    assert largest.lower < largest.value < largest.upper
    assert model.at_rate(0.97 * largest.value)["within"].value >= 0.99
    assert model.at_rate(1.1 * largest.value)["within"].value < 0.99
    (loose,) = points(rate=10.0, ttft_s=0.2, tpot_s=0.02, goodput=0.9)
    assert loose.numbers["largest_rate"].value > largest.value


def test_a_rate_needs_replicas_and_their_cost() -> None:
    (point,) = points(rate=100.0, ttft_s=0.3, tpot_s=0.03, price=2.0)
    largest = point.numbers["largest_rate"]
    assert point.replicas == -(-100.0 // largest.value) > 1
    gpus = point.numbers["gpus"]
    assert gpus == (point.replicas, -(-100.0 // largest.upper), -(-100.0 // largest.lower))
    hourly = 100.0 * 128 * 3600.0 / 1e6
    assert point.numbers["cost"].value == pytest.approx(2.0 * gpus.value / hourly, rel=0.1)
    (stated,) = points(rate=100.0, ttft_s=0.3, tpot_s=0.03, replicas=point.replicas)
    assert stated.numbers["ttft_p99"].value == point.numbers["ttft_p99"].value


def test_a_pruned_model_can_run_where_the_dense_one_cannot() -> None:
    (service,) = loads("llama-2-70b", rate=0.5, prune="depth 0.5", devices=1)
    dense, pruned = service.points
    assert "tokens that the cache holds" in dense.refused
    assert not dense.numbers
    assert pruned.drains
    assert of_loads([service])[0].startswith("With depth at 50 %, the 99th percentile is")
    with pytest.raises(InputError, match="tokens that the cache holds"):
        loads("llama-2-70b", rate=0.5, devices=1)


def test_the_fewest_gpus_among_several_splits() -> None:
    services = loads("llama-2-70b", rate=2.0, ttft_s=0.5, tpot_s=0.04, devices=[2, 4, 8])
    dense, pruned = best_points(services)
    assert dense is not None
    assert pruned is None
    every = [point.numbers["gpus"].value for service in services for point in service.points]
    assert dense.numbers["gpus"].value == min(every)


def test_clients_and_traces(tmp_path: Path) -> None:
    (closed,) = points(concurrency=8)
    (more,) = points(concurrency=32)
    assert closed.numbers["tokens_per_s"].value < more.numbers["tokens_per_s"].value
    assert closed.numbers["tpot_p50"].value < more.numbers["tpot_p50"].value
    trace = tmp_path / "trace.csv"
    trace.write_text("arrival,prompt,output\n" + "".join(f"{i},512,64\n" for i in range(50)))
    (slow,) = points(trace=trace, requests=None, length_sd=0.0)
    (fast,) = points(trace=trace, requests=None, length_sd=0.0, rate=20.0)
    assert slow.rate == pytest.approx(50 / 49)
    assert fast.numbers["ttft_p99"].value > slow.numbers["ttft_p99"].value
    with pytest.raises(InputError, match="trace: expected without requests"):
        loads(trace=trace)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([2.0, 1.0, 4.0, 2.0, 2.0], (2.0, 1.0, 4.0)),
        (
            [1.0, np.exp(-0.3), np.exp(0.3), np.exp(0.4), np.exp(-0.4)],
            (1.0, np.exp(-0.5), np.exp(0.5)),
        ),
        ([0.0, 0.0, 1.0], (0.0, 0.0, 1.0)),
        ([5.0, 6.0, 7.0], (5.0, 5.0, 7.0)),
    ],
)
def test_ends_of_errors_are_combined(values: list[float], expected: Any) -> None:
    assert Interval.of(values) == pytest.approx(expected)


@pytest.mark.parametrize("arriving", [{"rate": 4.0, "ttft_s": 0.3}, {}])
def test_formats_are_rows_of_one_table(arriving: dict[str, Any]) -> None:
    """Each row has the numbers of a service in its format alone; an A100 computes fp8 in 16
    bits."""
    settings = {**LOAD, **arriving} if arriving else {"concurrency": 8}
    for device, end in (("h100", "in fp8"), ("a100", "with fp8 weights")):
        found = serve("llama-3.1-8b", device, prune="depth 0.25", dtype=["bf16", "fp8"], **settings)
        assert len(found.loads or found.services) == 1
        rows = {point.name: point.to_dict() for point in found.points[:4]}
        names = ("dense", "depth at 25 %")
        assert [*rows] == ["dense", f"dense {end}", names[1], f"{names[1]} {end}"]
        for dtype, suffix in (("bf16", ""), ("fp8", f" {end}")):
            alone = serve("llama-3.1-8b", device, prune="depth 0.25", dtype=dtype, **settings)
            for name, point in zip(names, alone.points):
                column = "ttft_p99" if arriving else "tokens_per_s"
                assert rows[f"{name}{suffix}"][column] == pytest.approx(point.to_dict()[column])
        wide = [note for note in found.notes if "has no fp8 arithmetic" in note]
        assert len(wide) == (device == "a100")


def test_figures_of_a_load() -> None:
    services = loads(rate=10.0, ttft_s=0.2, tpot_s=0.02, prune="depth 0.25", requests=60)
    figure = loads_of(services)
    assert [ax.get_xlabel() for ax in figure.axes] == ["requests/s per replica"] * 2
    for ax in figure.axes:
        dense, pruned = (line.get_ydata() for line in ax.lines if len(line.get_xdata()) > 2)
        assert (np.diff(dense) > -0.1 * dense[:-1]).all()
        assert pruned[0] < dense[0]
    bars = timeline_of(services[0]).axes[0].patches
    assert len(bars) == 3 * 60
    with pytest.raises(InputError, match="timeline: expected at most 60 requests"):
        timeline_of(loads(rate=10.0)[0])
