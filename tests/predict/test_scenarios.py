"""The product of settings: order, agreement with single predictions, what is left out and what is refused; and files written whole."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

import simulator
from simulator import load_hardware, load_model, lower, prune, speedup
from simulator.errors import InputError
from simulator.files.write import write_whole
from simulator.predict.gemms import gemm_table
from simulator.predict.settings import Setting
from simulator.predict.table import explanations, families
from simulator.pruning import FAMILIES


def test_records_are_the_single_predictions_in_order() -> None:
    table = simulator.table(
        ["llama-3.1-8b"], ["h100", "a100"], ["width", "depth"], [0.5, 0.25], ["decode", "prefill"], [1, 4], [512]
    )
    assert [(r.phase, r.batch, r.family, r.sparsity, r.hardware) for r in table][:5] == [
        ("decode", 1, "width", 0.5, "h100_sxm"),
        ("decode", 1, "width", 0.5, "a100_sxm_80gb"),
        ("decode", 1, "width", 0.25, "h100_sxm"),
        ("decode", 1, "width", 0.25, "a100_sxm_80gb"),
        ("decode", 1, "depth", 0.5, "h100_sxm"),
    ]
    assert len(table) == 2 * 2 * 2 * 2 * 2
    model = load_model("llama-3.1-8b")
    for r in table.records[::5]:
        dense = lower(model, phase=r.phase, batch=r.batch, seq=r.seq)
        single = speedup(dense, prune(dense, r.family, r.sparsity), load_hardware(r.hardware))
        assert r.speedup == pytest.approx(single.speedup, rel=1e-12)
        assert r.speedup_lower == pytest.approx(single.lower, rel=1e-12)
        assert r.roofline_bound == pytest.approx(single.roofline_bound, rel=1e-12)
        assert r.realised_sparsity == single.realised_sparsity


def test_names_that_mean_the_same_count_once() -> None:
    table = simulator.table(
        ["llama-3.1-8b"], ["h100", "h100_sxm"], ["depth", "depth"], [0.25, 0.25], ["prefill", "prefill"], [1, 1]
    )
    assert len(table) == 1
    assert families(["width", "all"]) == ("width", *(name for name in FAMILIES if name != "width"))


def test_an_unsupported_combination_is_a_note_among_several_families_and_an_error_alone() -> None:
    table = simulator.table(["llama-3.1-8b"], ["h100"], ["depth", "semi_structured"], [0.25, 0.5])
    assert [(r.family, r.sparsity) for r in table] == [("depth", 0.25), ("depth", 0.5), ("semi_structured", 0.5)]
    (note,) = table.notes
    assert note.startswith("semi_structured")
    assert note.endswith("left out at sparsity 0.25")
    with pytest.raises(InputError, match="semi_structured"):
        simulator.table(["llama-3.1-8b"], ["h100"], ["semi_structured"], [0.25, 0.5])
    with pytest.raises(InputError, match="expected at least one"):
        simulator.table(["llama-3.1-8b"], ["h100"], ["depth"], [])


def test_memory_says_what_does_not_fit_and_pruning_may_help() -> None:
    table = simulator.table(["llama-2-70b"], ["h200", "4090"], ["depth"], [0.1, 0.5], ["decode"])
    at = {(r.hardware, r.sparsity): r for r in table}
    assert at["h200_sxm", 0.5].pruned_fits
    assert not at["rtx_4090", 0.5].pruned_fits
    assert at["h200_sxm", 0.5].pruned_memory_bytes < 0.55 * at["h200_sxm", 0.5].dense_memory_bytes
    assert any("rtx_4090" in note and "devices" in note for note in table.notes)
    assert [r.dense_fits for r in table] == [r.dense_memory_bytes <= r.capacity_bytes for r in table]


def test_more_positions_than_a_model_has_are_noted() -> None:
    assert simulator.table(["opt-13b"], ["h100"], ["depth"], [0.25], ["prefill"], [1], [2048]).notes == ()
    (note,) = simulator.table(["opt-13b"], ["h100"], ["depth"], [0.25], ["prefill", "decode"], [1], [2049]).notes
    assert "opt-13b is made for 2048 positions" in note
    (note,) = simulator.table(
        ["opt-13b"], ["h100"], ["depth"], [0.25], ["generate"], [1], [2040], setting=Setting(new_tokens=16)
    ).notes
    assert "2056" in note


def test_settings_reach_the_prediction() -> None:
    def times(setting: Setting) -> tuple[float, float]:
        (r,) = simulator.table(["llama-3.1-8b"], ["h100"], ["depth"], [0.25], ["decode"], setting=setting)
        return r.dense_s, r.dense_memory_bytes

    plain = times(Setting())
    assert times(Setting(weight_dtype="int4"))[0] < plain[0]
    assert times(Setting(weight_dtype="int4"))[1] < plain[1]
    assert times(Setting(kv_dtype="fp8"))[1] < plain[1]
    assert times(Setting(runtime="eager"))[0] > plain[0]
    assert times(Setting(devices=2))[1] < plain[1]
    (generate,) = simulator.table(
        ["llama-3.1-8b"], ["h100"], ["depth"], [0.25], ["generate"], setting=Setting(new_tokens=16)
    )
    assert generate.new_tokens == 16
    assert generate.dense_s > 15 * plain[0]


def test_progress_counts_every_job() -> None:
    seen: list[tuple[int, int]] = []
    simulator.table(
        ["llama-3.1-8b"],
        ["h100", "a100"],
        ["depth"],
        [0.25],
        ["prefill", "decode"],
        progress=lambda done, total: seen.append((done, total)),
    )
    assert seen == [(1, 4), (2, 4), (3, 4), (4, 4)]


@pytest.mark.parametrize("family", [name for name in FAMILIES])
def test_every_family_is_explained_exactly(family: str) -> None:
    for e in explanations("llama-3.1-8b", ["h100", "a100"], family, 0.5, ["prefill", "decode"], [2], [512]):
        reached = 1.0
        for step in e.steps:
            reached *= step.factor
            assert reached == pytest.approx(step.speedup, rel=1e-9)
        assert reached == pytest.approx(e.record.speedup, rel=1e-9)


def test_gemm_table_is_the_product() -> None:
    rows = gemm_table([1, 64], [4096], [4096, 1024], ["h100", "4090"])
    assert [(r.hardware, r.m, r.k) for r in rows] == [
        (h, m, k) for h in ("h100_sxm", "rtx_4090") for m in (1, 64) for k in (4096, 1024)
    ]
    for r in rows:
        assert r.flop_per_s == pytest.approx(2.0 * r.m * r.n * r.k / r.seconds)
        assert r.seconds >= r.roofline_s * 0.99
        assert r.ladder_s["launch"] == r.seconds
    (sparse,) = gemm_table([2048], [4096], [4096], ["h100"], semi_structured=True)
    (dense,) = gemm_table([2048], [4096], [4096], ["h100"])
    assert sparse.seconds < dense.seconds


def test_a_file_is_replaced_with_its_mode_and_through_its_link(tmp_path: Path) -> None:
    real, link = tmp_path / "real.csv", tmp_path / "link.csv"
    real.write_text("old")
    real.chmod(0o640)
    link.symlink_to(real)
    write_whole(link, b"new")
    assert link.is_symlink()
    assert real.read_bytes() == b"new"
    assert stat.S_IMODE(real.stat().st_mode) == 0o640
    assert sorted(p.name for p in tmp_path.iterdir()) == ["link.csv", "real.csv"]


def test_a_device_is_written_to_and_not_replaced(tmp_path: Path) -> None:
    write_whole("/dev/null", b"x")
    assert stat.S_ISCHR(os.stat("/dev/null").st_mode)
    with pytest.raises(InputError, match="is a folder"):
        write_whole(tmp_path, b"x")
