"""A dense model against existing pruned models: they are predicted like their families, in one
setting, and named."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from layouts import folder_of, save, tensors_of
from shaped import changed, each_sublayer, resized

import simulator
from simulator.codes import Kind
from simulator.errors import InputError
from simulator.models.form import SPARSE24
from simulator.models.model import Layer, Model
from simulator.models.write import content_of
from simulator.prediction.explain import explanations
from simulator.prediction.prunings import ALIKE
from simulator.prediction.runnable import runnables
from simulator.prediction.table import table

pytestmark = pytest.mark.quick

DENSE = simulator.load_model("llama-2-7b")
H100 = simulator.load_hardware("h100")


def sized(**sizes: Any) -> Model:
    return resized(DENSE, name="pruned", **sizes)


SPARSE = each_sublayer(
    sized(), lambda s: s.with_forms(dict.fromkeys(s.weights(DENSE.hidden), SPARSE24))
)
NARROW = sized(heads=26, kv_heads=26, inner=8810).layers[0]
LLM_PRUNER = changed(DENSE, lambda i, one: NARROW if 4 <= i <= 29 else one, name="pruned")


def without_attention(number: int, layer: Layer) -> Layer:
    return layer.without("attention") if 23 <= number < 31 else layer


def lowered(model: Model, **options: Any) -> simulator.Workload:
    return simulator.lower(
        model, **{"phase": "decode", "batch": 4, "seq": 1024, "engine": "vllm", **options}
    )


@pytest.mark.parametrize(
    ("model", "family", "sparsity", "options"),
    [
        (sized(layers=24), "depth", 0.25, {}),
        (sized(heads=24, kv_heads=24, inner=8256), "width", 0.25, {}),
        (sized(hidden=3072), "width_cross", 0.25, {}),
        (SPARSE, "semi_structured", 0.5, {}),
        (changed(DENSE, without_attention), "depth", 0.25, {"unit": "attention"}),
    ],
)
def test_a_model_that_exists_is_timed_as_the_family_that_makes_it(
    model: Model, family: str, sparsity: float, options: dict[str, Any]
) -> None:
    engine = "hf" if family == "semi_structured" else "vllm"
    dense = lowered(DENSE, engine=engine)
    theirs = simulator.speedup(dense, lowered(model, engine=engine), H100)
    ours = simulator.speedup(dense, simulator.prune(dense, family, sparsity, **options), H100)
    for name in ("pruned_s", "speedup", "lower", "upper", "flop_bound", "roofline_bound"):
        assert getattr(theirs, name) == pytest.approx(getattr(ours, name), rel=1e-9), name
    assert theirs.family == family
    left = model.parameters if not model.sparse24 else lowered(model).parameters
    assert theirs.sparsity == theirs.realised_sparsity == pytest.approx(1 - left / DENSE.parameters)


def test_a_model_that_cannot_be_read_is_skipped_if_others_remain(tmp_path: Path) -> None:
    folder, bad = folder_of(tmp_path, "llama-2-7b"), tmp_path / "bad"
    save(folder / "model.safetensors", tensors_of(LLM_PRUNER))
    bad.mkdir()
    reason = f"{bad}: the folder has no config.json; expected a Hugging Face model folder"
    found = table(
        [DENSE], ["h100"], pruned=[str(bad), str(folder), str(tmp_path / "none")], phase=["decode"]
    )
    assert [r.pruned for r in found] == ["llama-2-7b"]
    assert found.notes[0] == f"{reason}: this pruned model is skipped"
    assert "none' is unknown" in found.notes[1] or "none: " in found.notes[1]
    for alone in ([str(bad)], [str(bad), str(tmp_path / "none")]):
        with pytest.raises(InputError) as error:
            table([DENSE], ["h100"], pruned=alone)
        assert str(error.value) == reason


def test_tables_and_explanations_say_what_was_pruned(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, "llama-2-7b")
    save(folder / "model.safetensors", tensors_of(LLM_PRUNER))
    found = table(
        ["llama-2-7b"], ["h100", "a100"], pruned=[str(folder), LLM_PRUNER], phase=["decode"]
    )
    named = [(r.pruned, r.family, r.hardware) for r in found]
    assert named[::2] == [("llama-2-7b", "width", "h100_sxm"), ("pruned", "width", "h100_sxm")]
    assert [r.speedup for r in found][:2] == [r.speedup for r in found][2:]
    assert found[0].sparsity == pytest.approx(1 - 5_709_025_280 / 6_738_415_616)
    (note,) = [n for n in found.notes if n.startswith("pruned: ")]
    assert "width in layers 4-29" in note
    assert "8,810 of 11,008" in note
    (e,) = explanations("llama-2-7b", ["h100"], pruned=[LLM_PRUNER], phase=["prefill"])
    assert e.steps[0].speedup == pytest.approx(6_738_415_616 / 5_709_025_280)
    assert e.steps[-1].speedup == pytest.approx(e.result.speedup)
    assert next(s for s in e.steps if s.name == "alignment").factor < 0.95  # 8810 is off 8


@pytest.mark.parametrize("name", ALIKE)
def test_unlike_settings_are_refused_in_one_line(name: str) -> None:
    same: dict[str, Any] = {"phase": "serve", "new_tokens": 8, "devices": 2}
    other = {
        "engine": "sglang",
        "phase": "generate",
        "batch": 5,
        "seq": 5,
        "new_tokens": 9,
        "dtype": "fp16",
    }
    other |= {
        "devices": 1,
        "parallel": "pipeline",
        "link": "pcie",
        "cached_prefix": 3,
        "token_budget": 64,
    }
    dense, pruned = lowered(DENSE, **same), lowered(LLM_PRUNER, **same | {name: other[name]})
    with pytest.raises(InputError, match=f"^{name}: the pruned model has .*; expected the same$"):
        simulator.speedup(dense, pruned, H100)


def test_a_model_against_itself_is_refused() -> None:
    equal = "llama-2-7b has the shapes, number formats and declared sparsity of llama-2-7b"
    with pytest.raises(InputError, match=equal):
        table(["llama-2-7b"], ["h100"], pruned=["llama-2-7b"], phase=["decode"])


def test_a_pruned_model_takes_no_sparsity_or_option() -> None:
    for given in ({"sparsity": [0.5]}, {"options": {"align": 8}}):
        with pytest.raises(InputError, match="a pruned model state the whole pruning"):
            table(["llama-2-7b"], ["h100"], pruned=[LLM_PRUNER], **given)
    with pytest.raises(InputError, match="expected one dense model"):
        table(["llama-2-7b", "llama-2-13b"], ["h100"], pruned=[LLM_PRUNER])


def products(name: str | Model, kinds: tuple[Kind, ...] = (Kind.GEMM, Kind.EXPERTS)) -> float:
    """FLOPs of the products of one token."""
    w = simulator.lower(name, phase="decode", batch=1, seq=64, engine="vllm")
    return float(w.flops[np.isin(w.kind, kinds)].sum())


def nemotron(hidden: int, inner: int, mamba: int, attention: int, mlp: int) -> int:
    """FLOPs of the products of one token in Nemotron-Nano-v2: 128 Mamba heads of 80 channels, B and
    C of 8 groups with a state of 128, 40 query and 8 KV heads of 128."""
    mixer = hidden * (2 * 10240 + 2 * 8 * 128 + 128) + 10240 * hidden
    heads = hidden * (40 + 2 * 8) * 128 + 40 * 128 * hidden
    return 2 * (mamba * mixer + attention * heads + mlp * 2 * hidden * inner + 131072 * hidden)


def test_nemotron_nano_is_narrower_and_lacks_six_layers() -> None:
    dense, pruned = "nemotron-nano-12b-v2", "nemotron-nano-9b-v2"
    counts = nemotron(5120, 20480, 28, 6, 28), nemotron(4480, 15680, 27, 4, 25)
    assert (products(dense), products(pruned)) == counts
    rows = table([dense], [H100], pruned=[pruned])
    assert rows[0].flop_bound == pytest.approx(counts[0] / counts[1], rel=0.01)
    assert 1.2 < rows[0].speedup < rows[0].byte_bound < 1.41
    assert rows[0].parts == (
        "layers 9.7 % (62 to 56); Mamba-2 sublayers 3.6 % (28 to 27); MLP sublayers 10.7 % (28 to 25); attention sublayers"
        " 33.3 % (6 to 4); inner width 23.4 % (20,480 to 15,680); hidden size 12.5 % (5,120 to"
        " 4,480)"
    )
    (note,) = [note for note in rows.notes if "width_cross" in note]
    assert "depth: 1 Mamba-2, 3 MLP and 2 attention of 62 layers removed" in note
    assert "an MLP of 15,680 of 20,480" in note
    assert runnables(rows)[0].works


def test_puzzle_halves_the_active_experts() -> None:
    """40 layers of experts, with 440 active ones in all; the state shrinks by a quarter."""
    dense, pruned = "nemotron-3-super-120b-a12b", "nemotron-3-puzzle-75b-a9b"
    experts = [
        s
        for one in simulator.load_model(pruned).layers
        for s in one.sublayers
        if s.label == "experts"
    ]
    widths = sum(s.inner * int(s.active) for s in experts)
    assert (len(experts), sum(s.active for s in experts)) == (40, 440)
    # up and down projections of experts on a latent of 1,024
    assert products(pruned, (Kind.EXPERTS,)) == 2 * 2 * 1024 * widths
    assert products(dense, (Kind.EXPERTS,)) == 2 * 2 * 1024 * 40 * 22 * 2688
    rows = table([dense], [H100], pruned=[pruned], devices=8, engine="vllm")
    assert rows[0].parts == (
        "Mamba state 25 % (128 to 96); active experts 50 % (22 to 11); expert width 40.1 % (2,688 to"
        " 1,610)"
    )
    assert runnables(rows)[0].works


def test_experts_that_reap_removes_save_no_time_of_one_token() -> None:
    """A token of MiniMax-M2 uses 8 experts of 256, or of 180."""
    content = {**content_of("minimax-m2"), "num_local_experts": 180}
    pruned = simulator.load_model(content)
    expert = 3 * 3072 * 1536 + 3072 + 1
    dense = simulator.load_model("minimax-m2")
    assert dense.parameters - pruned.parameters == 62 * 76 * expert
    router = 2 * 62 * 3072 * 76
    assert products("minimax-m2") - products(pruned) == router
    rows = table([dense], [H100], pruned=[pruned], devices=8)
    assert rows[0].lower < 1.0 < rows[0].upper
    assert rows[0].parts == "experts 29.7 % (256 to 180)"
