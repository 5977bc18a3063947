"""Figures of a paper show the predictions of the simulator, and they print without clashes."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from printing import check_print

import simulator
from simulator.figures.measured import MOST_DOTS, MeasuredGemms
from simulator.figures.paper import FIGURES, OPERATORS, Paper, draw, paper
from simulator.figures.style import device_title
from simulator.figures.tables import SKIPPED_PAIRS, kept_axes
from simulator.figures.waterfall import Steps, folded, waterfall_figure
from simulator.hardware.library import load_hardware
from simulator.pruning import general_families, prune
from simulator.uncertainty.operators import GemmOptions, gemm_time

if TYPE_CHECKING:
    from simulator.figures.paper import Drawn
    from simulator.hardware.profile import HardwareProfile

GPUS = ("a100_sxm_80gb", "h100_sxm", "rtx_4090")
TINY = {"model_type": "llama", "vocab_size": 512, "hidden_size": 64, "intermediate_size": 128}
TINY |= {"num_hidden_layers": 2, "num_attention_heads": 4}


def measured(hw: HardwareProfile, rows: int, noise: float = 0.03) -> MeasuredGemms:
    """Times around the predicted ones, among them the fused projection of Llama-3.1-8B at every
    sixteenth M."""
    rng = np.random.default_rng(5)
    m = np.concatenate([np.arange(16, 2049, 16), rng.integers(1, 8193, rows)])
    n, k = (
        np.concatenate([np.full(128, first), 64 * rng.integers(1, 257, rows)])
        for first in (6144, 4096)
    )
    seconds = gemm_time(m, n, k, hw).seconds * np.exp(noise * rng.standard_normal(len(m)))
    return MeasuredGemms("planted", m.astype(float), n.astype(float), k.astype(float), seconds)


@pytest.fixture(scope="module")
def about() -> Paper:
    whole = paper("llama-3.1-8b", GPUS)
    rows = zip(whole.devices, (2 * MOST_DOTS, 4000, 100), strict=True)
    return replace(whole, measured={hw.name: measured(hw, count) for hw, count in rows})


@pytest.fixture(scope="module")
def one() -> Paper:
    whole = paper("opt-13b", ["rtx_4090"], engine="reference", seq=512)  # with 2:4
    return replace(whole, measured={hw.name: measured(hw, 300) for hw in whole.devices})


@pytest.fixture(scope="module")
def drawn(about: Paper, one: Paper) -> dict[str, Drawn]:
    out = {name: draw(name, about) for name in FIGURES}
    return out | {f"{name}, one device": draw(name, one) for name in FIGURES}


NAMES = [*FIGURES, *(f"{name}, one device" for name in FIGURES)]


@pytest.mark.parametrize("name", NAMES)
def test_figures_print_without_clashes(name: str, drawn: dict[str, Drawn]) -> None:
    check_print(drawn[name].figure)
    found = drawn[name].figure.findobj(lambda a: hasattr(a, "get_fontsize") and a.get_text())
    assert min(a.get_fontsize() for a in found) >= 6


def test_captions_state_what_an_engine_cannot_run(drawn: dict[str, Drawn]) -> None:
    assert drawn["speedup"].caption.endswith("2:4 is excluded: vLLM has no kernels for it.")
    # no method of it has quality on the axis that was drawn
    assert "2:4" not in drawn["pareto"].caption
    assert drawn["waterfall"].caption.endswith(
        "2:4 is shown in torch.compile: vLLM has no kernels for it."
    )
    titles = [ax.get_title().replace(",\n", ", ") for ax in drawn["waterfall"].figure.axes]
    expected = [f"{device_title(g)}, {e}" for e in ("vLLM", "torch.compile", "vLLM") for g in GPUS]
    assert [t.split("\n")[0] for t in titles] == expected
    # reference has it
    assert not any("2:4 is" in drawn[f"{name}, one device"].caption for name in FIGURES)


@pytest.mark.parametrize("family", general_families())
@pytest.mark.parametrize("phase", ["prefill", "decode"])
def test_kept_axes_multiply_to_the_flops_that_are_left(family: str, phase: str) -> None:
    dense = simulator.lower("llama-3.1-8b", phase=phase, batch=4, seq=1024, engine="")
    pruned = prune(dense, family, 0.5)
    for roles in OPERATORS.values():
        before, after = (
            float(w.flops[w.is_role(*roles) & ~w.overhead].sum()) for w in (dense, pruned)
        )
        kept = kept_axes(dense, pruned, roles, SKIPPED_PAIRS.get(family, "N"))
        assert float(np.prod(kept)) == pytest.approx(after / before, rel=1e-12)
        assert min(kept) > 0
        assert max(kept) <= 1.0 + 1e-12


def test_the_taxonomy_is_that_of_the_reference_paper(about: Paper) -> None:
    dense = simulator.lower(about.model, phase="prefill", batch=1, seq=2048, engine="")

    def changed(family: str, *roles: str) -> str:
        kept = kept_axes(dense, prune(dense, family, 0.5), roles, SKIPPED_PAIRS.get(family, "N"))
        return "".join(axis for axis, share in zip("MNK", kept, strict=True) if share < 0.6)

    expected = {
        "q": "depth M, width N, width_cross K, semi_structured K, dynamic_depth M, dynamic_width N",
        "down": (
            "depth M, width K, width_cross N, low_rank K, dynamic_width K, token M, unstructured K"
        ),
        "attention": (
            "depth M, width K, sparse_attention N, dynamic_depth M, dynamic_width K, low_rank -"
        ),
        "lm_head": "depth -, width_cross K, semi_structured -",
    }
    for role, pairs in expected.items():
        for pair in pairs.split(", "):
            family, axes = pair.split(" ")
            assert (changed(family, role) or "-") == axes, (role, family)


def test_predictions_beside_measurements_assume_the_same_rotation_of_weights() -> None:
    hw = load_hardware("a100")
    one = np.ones(1)
    table = MeasuredGemms("mine", 8 * one, 4096 * one, 2048 * one, 1e-5 * one, copies=one)
    assert (
        table.predict(hw)[0] == gemm_time(8, 4096, 2048, hw, options=GemmOptions(copies=1)).seconds
    )
    assert table.predict(hw)[0] != gemm_time(8, 4096, 2048, hw).seconds


def test_steps_within_a_percent_are_folded_and_the_product_is_exact() -> None:
    names, factors = ["a", "b", "c", "d", "e"], [1.002, 0.8, 0.993, 1.0, 1.009]
    two = [
        Steps("x", names, factors, 1.5, 1.0, 1.3),
        Steps("y", names, [1.0, 1.0, 0.98, 1.0, 1.0], 1.5, 1, 1.6),
    ]
    (alone,) = folded(two[:1])
    assert alone.names == ["b", "other (4 steps)"]
    assert alone.factors[-1] == pytest.approx(1.002 * 0.993 * 1.009, rel=1e-15)
    for before, after in zip(two, folded(two), strict=True):
        assert after.names == [
            "b",
            "c",
            "other (3 steps)",
        ], "a step stays if it matters in one panel"
        assert after.reached[-1] == pytest.approx(before.reached[-1], rel=1e-15)
        assert after.nominal == before.nominal
    assert folded([Steps("x", ["a", "b"], [1.0, 0.8], 1.5, 1.0, 1.3)])[0].names == [
        "a",
        "b",
    ], "one step alone keeps its name"
    rows = waterfall_figure([replace(two[0], title="1"), replace(two[1], title="2")], columns=1)
    steps = [[t.get_text() for t in ax.get_yticklabels()][1:-1] for ax in rows.axes]
    assert steps == [["b", "other (4 steps)"], ["c", "other (4 steps)"]]


LINE = "figures llama-3.1-8b"


@pytest.fixture
def without_shipped(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave out the measured GEMMs that ship."""
    monkeypatch.setattr("calibration.cli.figures.shipped_gemms", lambda hw, dtype: None)


@pytest.mark.usefixtures("without_shipped")
def test_one_command_writes_figures_and_captions(tmp_path: Path, cli: Any) -> None:
    table = tmp_path / "gemms.csv"
    table.write_text(
        "m,n,k,latency_us,dtype,note\n1,6144,4096,54.9,bf16,\n512,6144,4096,165,bf16,x\n512,6144,4096,80,fp8,\n"
    )
    out = tmp_path / "new" / "out"
    chosen = "taxonomy,scatter"
    printed = cli.out(f"{LINE} -o {out} --hardware 4090 --only {chosen} --measured 4090={table}")
    files = {f"{name}{suffix}" for name in chosen.split(",") for suffix in (".pdf", ".png")}
    assert {p.name for p in out.iterdir()} == {*files, "captions.md"}
    captions = (out / "captions.md").read_text()
    assert re.findall(r"^## (.+)$", captions, re.MULTILINE) == ["taxonomy", "scatter"]
    commands = re.findall(r"^`prunesim (.+)`$", captions, re.MULTILINE)
    again = tmp_path / "again"
    for name, command in zip(chosen.split(","), commands, strict=True):
        assert cli.out(command.replace("DIR", str(again))).startswith(str(again / name))
        assert (again / f"{name}.png").read_bytes() == (out / f"{name}.png").read_bytes()
    assert "gemms.csv" in captions
    assert str(out / "captions.md") in printed


@pytest.mark.usefixtures("without_shipped")
def test_what_lacks_data_is_left_out_with_a_note(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cli: Any
) -> None:
    few = {name: FIGURES[name] for name in ("taxonomy", "scatter")}
    monkeypatch.setattr("simulator.figures.paper.FIGURES", few)
    assert "no measured GEMMs" in cli(f"{LINE} -o {tmp_path} --format png")[1]
    assert {p.name for p in tmp_path.iterdir()} == {"taxonomy.png", "captions.md"}
    assert "is a file" in cli.refused(f"{LINE} -o {tmp_path / 'captions.md'} --only taxonomy")


@pytest.mark.usefixtures("without_shipped")
@pytest.mark.parametrize(
    ("options", "says"),
    [
        ("--only taxonmy", "figure 'taxonmy'"),
        ("--only scatter", "no measured GEMMs of a100_sxm_80gb, h100_sxm, rtx_4090"),
        ("--format jpg", "format 'jpg'"),
        ("--measured 4090", "expected DEVICE=FILE"),
        ("--measured 4090=missing.csv", "missing.csv: cannot be read"),
        ("--measured l40s=missing.csv", "l40s is not among --hardware"),
        (
            "--hardware h100 --measured h100=setup.cfg --measured h100_sxm=setup.cfg",
            "expected one table of h100_sxm",
        ),
    ],
)
def test_bad_input_is_one_line_and_status_2(
    options: str, says: str, tmp_path: Path, cli: Any
) -> None:
    assert says in cli.refused(f"{LINE} -o {tmp_path / 'out'} {options}")
