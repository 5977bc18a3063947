"""Speedups are drawn over the field that varies, services over their time per token."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from printing import check_print

import simulator
from simulator.figures.speedup import PAYS, pays_from, services_of, speedups_of, varying
from simulator.figures.style import label, styles_of
from simulator.prediction.speedup_sentences import break_even
from simulator.prediction.wording import GAIN

MODEL = "llama-3.1-8b"


def table(*families: str, sparsity: Any = (0.25,), **axes: Any) -> Any:
    gpus = axes.pop("hardware", ["h100", "a100"])
    return simulator.table([MODEL], gpus, list(families), list(sparsity), **axes).rows


def legend(figure: Any) -> list[str]:
    return [t.get_text() for t in figure.legends[0].get_texts()]


def ticks(ax: Any) -> list[str]:
    text = ax.xaxis.get_major_formatter()
    return [text(value) for value in ax.get_xticks()]


def curves(ax: Any, marker: str) -> Any:
    (line,) = (
        line for line in ax.lines if line.get_marker() == marker and line.get_markersize() < 6
    )
    return line


def test_one_candidate_over_batches_has_a_panel_per_device_and_engine_with_shared_axes() -> None:
    batches, engines = [1, 2, 4, 8, 16, 32, 64], ["vllm", "hf"]
    rows = table("width", batch=batches, engine=engines)
    figure = speedups_of(rows)
    check_print(figure)
    assert varying(rows) == "batch"
    assert [ax.get_title() for ax in figure.axes] == ["H100 SXM", "A100 80GB SXM", "", ""]
    named = [ax.texts[0].get_text().replace("\n", " ") for ax in figure.axes[1::2]]
    assert named == ["decode, vLLM", "decode, Transformers (eager)"]
    assert len({(ax.get_xlim(), ax.get_ylim()) for ax in figure.axes}) == 1
    assert legend(figure)[0] == "Width, 25 %"
    assert figure.legends[0].get_title().get_text() == "batch size"
    assert figure.get_suptitle() == "Llama-3.1-8B"
    panels = [(gpu, engine) for engine in engines for gpu in ("h100_sxm", "a100_sxm_80gb")]
    for ax, (gpu, engine) in zip(figure.axes, panels, strict=True):
        own = [r for r in rows if (r.hardware, r.engine) == (gpu, engine)]
        assert ax.get_xscale() == "log"
        assert ticks(ax) == [str(b) for b in batches]
        np.testing.assert_allclose(curves(ax, "s").get_xdata(), batches)
        np.testing.assert_allclose(curves(ax, "s").get_ydata(), [r.speedup for r in own])
        band = ax.collections[0].get_paths()[0].vertices[:, 1]
        assert band.min() == pytest.approx(min(r.speedup_lower for r in own))
        assert band.max() == pytest.approx(max(r.speedup_upper for r in own))
        assert any(set(np.atleast_1d(line.get_ydata())) == {1.0} for line in ax.lines), (
            "a line at 1"
        )
        rings = [line for line in ax.lines if line.get_markersize() > 6]
        pays = [
            r for i, r in enumerate(own) if all(later.speedup_lower >= GAIN for later in own[i:])
        ]
        assert [(line.get_xdata()[0], line.get_ydata()[0]) for line in rings] == [
            (r.batch, r.speedup) for r in pays[:1]
        ]
        (found,) = break_even(own)
        assert (found.verdict.startswith(("pays from", "pays at every"))) == bool(rings), (
            "as the sentence"
        )
    assert PAYS in legend(figure)


def test_of_two_fields_the_other_has_a_panel_per_value() -> None:
    lengths = speedups_of(table("depth", hardware=["h100"], batch=[1, 8], seq=[512, 2048, 8192]))
    assert [ax.texts[0].get_text() for ax in lengths.axes] == ["decode, batch 1", "decode, batch 8"]
    assert lengths.legends[0].get_title().get_text() == "sequence length (tokens)"
    assert ticks(lengths.axes[0]) == ["512", "2k", "8k"]
    removed = speedups_of(table("depth", hardware=["h100"], sparsity=(0.25, 0.5), batch=[1, 8, 64]))
    assert [ax.texts[0].get_text() for ax in removed.axes] == [
        "decode, 25 % removed",
        "decode, 50 % removed",
    ]
    assert legend(removed)[0] == "Depth"


@pytest.mark.quick
def test_styles_of_candidates_differ() -> None:
    many = styles_of({f"width {i}": "width" for i in range(12)} | {"depth": "depth"})
    assert len({(style.color, style.marker) for style in many.values()}) == 13


@pytest.mark.quick
@pytest.mark.parametrize(
    ("lower", "first"),
    [
        ([1.1, 1.2, 1.3], 0),
        ([0.9, 1.1, 1.3], 1),
        ([1.1, 0.9, 1.3], 2),
        ([1.1, 1.2, 1.0], None),
        ([0.9] * 3, None),
    ],
)
def test_a_candidate_pays_from_where_it_pays_at_every_larger_value(
    lower: list[float], first: int | None
) -> None:
    assert pays_from(lower) == first


def test_curves_are_the_points_of_the_service() -> None:
    prune = ["width 0.25", "depth 0.25", "depth 0.5", "kv_cache 0.5"]
    found = simulator.serve(
        "llama-3.1-8b", "h100", prune=prune, engine=["vllm", "sglang"], tpot_s=0.02, new_tokens=256
    )
    figure = services_of(found.services)
    check_print(figure)
    assert [ax.get_title() for ax in figure.axes] == ["H100 SXM, vLLM", "H100 SXM, SGLang"]
    assert services_of(found.services[:1]).axes[0].get_title() == "Llama-3.1-8B, H100 SXM, vLLM"
    service, ax = found.services[0], figure.axes[0]
    full, kept = service.kinds["equal memory"], service.kinds["within limits"]
    assert set(legend(figure)) >= {label(p.name) for p in full}
    numbers = {n for t in ax.texts[1:] for n in t.get_text().split(", ")}
    assert ax.texts[0].get_text() == "limit 20 ms"
    assert numbers == {f"{p.concurrency}" for p in full}
    curves = [line for line in ax.lines if line.get_markersize() == 2.6]
    rings = [line.get_xydata()[0] for line in ax.lines if line.get_markersize() == 8]
    looks = {
        (line.get_marker(), line.get_linestyle(), line.get_markerfacecolor()) for line in curves
    }
    assert len(looks) == len(curves) == len(full) == len(prune) + 1
    for curve, point in zip(curves, full, strict=True):
        assert (np.diff(curve.get_xdata()) > 0).all()
        assert curve.get_xydata()[-1] == pytest.approx([1e3 * point.tpot_s, point.tokens_per_s])
    np.testing.assert_allclose(rings, [(1e3 * point.tpot_s, point.tokens_per_s) for point in kept])


def test_a_figure_over_sparsity_has_the_nominal_line_and_three_bands_have_edges() -> None:
    found = table("depth", "width", "low_rank", sparsity=[0.1, 0.3, 0.5], hardware=["h100"])
    (ax,) = speedups_of(found).axes
    lines = [line.get_xydata() for line in ax.lines]
    assert any(len(line) == 100 and line[-1].tolist() == [0.5, 2.0] for line in lines)
    for end in ("lower", "upper"):
        depth = [getattr(r, end) for r in found if r.family == "depth"]
        assert any(len(line) == 3 and line[:, 1].tolist() == depth for line in lines)
