"""The grammar of ``--prune`` and of plans: what a text removes, and the place of each mistake."""

from __future__ import annotations

import math
import tracemalloc
from pathlib import Path

import pytest
from tables import tables_of
from tiny_decoder import FUSED, GQA, MHA, Decoder, workload

from simulator.errors import InputError
from simulator.models.lower import lower
from simulator.pruning import prune
from simulator.pruning._steps import PruningStep, read_steps
from simulator.workload import Workload

pytestmark = pytest.mark.quick


def size(w: Workload, role: str, column: str) -> float:
    at = w.is_role(role)
    return float((getattr(w, column) * w.layers)[at].sum() / w.layers[at].sum())


@pytest.mark.parametrize(
    ("text", "steps"),
    [
        ("depth 0.25", [PruningStep("depth", 0.25)]),
        ("depth 25%", [PruningStep("depth", 0.25)]),
        ("  width  mlp = 30 %  heads=.2 ", [PruningStep("width", (("mlp", 0.3), ("heads", 0.2)))]),
        ("width 0.2 align=64", [PruningStep("width", 0.2, options=(("align", 64),))]),
        ("low_rank 0.4 layers=1-2,4", [PruningStep("low_rank", 0.4, (1, 2, 4))]),
        ("depth layers=3", [PruningStep("depth", None, (3,))]),
        ("semi_structured", [PruningStep("semi_structured", 0.5)]),
        (
            "wanda-2:4 + width mlp=0.1",
            [PruningStep("wanda-2:4", 0.5), PruningStep("width", (("mlp", 0.1),))],
        ),
        ("2:4", [PruningStep("semi_structured", 0.5)]),
        ("depth 24", [PruningStep("depth", 24)]),
        ("width mlp=9216 heads=0.25", [PruningStep("width", (("mlp", 9216), ("heads", 0.25)))]),
        ("shortgpt 0.25+width 0.2", [PruningStep("shortgpt", 0.25), PruningStep("width", 0.2)]),
    ],
)
def test_texts(text: str, steps: list[PruningStep]) -> None:
    found = read_steps(text)
    assert list(found) == steps
    assert read_steps(" + ".join(map(str, found))) == found  # its own text reads back


@pytest.mark.parametrize(("text", "message"), tables_of("pruning/mistakes.yaml")["texts"])
def test_mistakes_have_their_place(text: str, message: str) -> None:
    with pytest.raises(InputError) as found:
        read_steps(text)
    assert message in str(found.value)


@pytest.mark.parametrize("decoder", [GQA, FUSED, MHA])
def test_parts_of_width(decoder: Decoder) -> None:
    w, d = workload(decoder, "decode"), decoder
    dense = w.parameters
    q, kv, head = d.heads * d.head_dim, d.kv_heads * d.head_dim, 2 if d.bias else 0

    heads = prune(w, "width heads=0.25")  # 8 -> 6 and 6 -> 4.5 -> 5 query heads; the cache stays
    kept = math.floor(0.75 * d.heads + 0.5)
    assert (size(heads, "attention", "heads"), size(heads, "attention", "kv_heads")) == (
        kept,
        d.kv_heads,
    )
    gone = (d.heads - kept) * d.head_dim * (2 * d.hidden + (1 if head else 0))
    assert dense - heads.parameters == pytest.approx(d.layers * gone, rel=1e-12)
    assert size(heads, "o", "k") == kept * d.head_dim
    assert size(heads, "cache_write", "write_bytes") == size(w, "cache_write", "write_bytes")

    groups = prune(w, "width kv=0.5")
    assert (size(groups, "attention", "heads"), size(groups, "attention", "kv_heads")) == (
        d.heads,
        d.kv_heads // 2,
    )
    gone = 2 * (kv // 2) * (d.hidden + (1 if head else 0))
    assert dense - groups.parameters == pytest.approx(d.layers * gone, rel=1e-12)
    assert size(groups, "cache_write", "write_bytes") == size(w, "cache_write", "write_bytes") / 2
    assert size(groups, "rotary", "n") == (q + kv // 2)

    hidden = prune(w, "width hidden=0.5 align=8")
    other = prune(w, "width_cross", 0.5, align=8)
    assert hidden.replace(meta=w.meta) == other.replace(meta=w.meta)
    assert hidden.meta.applied[0].sparsity == pytest.approx(0.5)

    both = prune(w, "width mlp=0.5 attention=0.5")
    assert both.replace(meta=w.meta) == prune(w, "width", 0.5).replace(meta=w.meta)


def test_parts_compose_to_the_requested_share() -> None:
    w = workload(GQA, "decode")
    steps = prune(w, "width heads=0.5 kv=0.5").meta.applied
    attention = 2 * 128 * 64 + 2 * 64 * 64  # q, o and k, v
    assert steps[0].sparsity == pytest.approx(0.5 * attention / (attention + 3 * 176 * 64))
    assert steps[0].realised == pytest.approx(steps[0].sparsity)
    nested = prune(w, "width attention=0.5 hidden=0.25").meta.applied[0]
    share = attention / (attention + 3 * 176 * 64)
    assert nested.sparsity == pytest.approx(1 - 0.75 * (1 - 0.5 * share))


@pytest.mark.parametrize("devices", [1, 2])
def test_a_whole_number_is_the_size_that_remains(devices: int) -> None:
    w = lower("llama-3.1-8b", phase="decode", devices=devices)
    out = prune(w, "width mlp=9216 heads=24 hidden=3072")
    assert [devices * size(out, "down", "k"), size(out, "down", "n")] == [9216, 3072]
    assert [
        devices * size(out, "attention", "heads"),
        devices * size(out, "attention", "kv_heads"),
    ] == [24, 8]
    equal = prune(w, "width", {"mlp": 9216, "heads": 24, "hidden": 3072})
    fractions = prune(w, "width", {"mlp": 1 - 9216 / 14336, "heads": 0.25, "hidden": 0.25})
    assert out == equal == fractions
    # not rounded
    assert size(prune(w, "width mlp=8810 layers=0-15"), "down", "k") == (8810 + 14336) / 2 / devices
    assert prune(w, "depth 24") == prune(w, "depth 0.25")
    assert prune(w, "width mlp=14336").meta.applied[0].realised == 0.0


@pytest.mark.parametrize(("model", "text", "message"), tables_of("pruning/mistakes.yaml")["sizes"])
def test_sizes_that_a_model_does_not_have(model: str, text: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        prune(lower(model, phase="decode"), text)


def test_listed_layers() -> None:
    w = workload(GQA)
    some = prune(w, "width mlp=0.5 layers=1-2")
    each = prune(w, "width", {"mlp": [0, 0.5, 0.5, 0, 0, 0]})
    assert some.replace(meta=w.meta) == each.replace(meta=w.meta)
    assert some.meta.applied[0].sparsity == pytest.approx(each.meta.applied[0].sparsity)
    ks = dict(
        zip(
            some.expand().layer[some.expand().is_role("down")],
            some.expand().k[some.expand().is_role("down")],
        )
    )
    assert ks == {0: 176, 1: 96, 2: 96, 3: 176, 4: 176, 5: 176}
    assert prune(w, "depth 0.5 layers=0-3").meta.applied[0].realised == pytest.approx(2 / 6)
    assert prune(w, "depth layers=0,5").meta.applied[0].sparsity == pytest.approx(2 / 6)


PLAN = """\
prune: kv_cache 0.25
layers:
  0: width mlp=0.5
  1,3: width mlp=0.25 attention=0.5
  2: depth
  4: depth unit=attention + width mlp=0.5
"""


def test_a_plan(tmp_path: Path) -> None:
    (tmp_path / "plan.yaml").write_text(PLAN)
    w = workload(GQA, "decode", seq=64)
    pruned = prune(w, str(tmp_path / "plan.yaml")).expand()
    down, attends = pruned.is_role("down"), pruned.is_attention
    assert pruned.k[down].tolist() == [96, 144, 144, 96, 176]  # layer 2 is gone
    assert pruned.kv_heads[attends].tolist() == [4, 2, 2, 4]  # and the attention of layer 4
    assert set(pruned.kv_len[attends]) == {49}
    assert [step.family for step in pruned.meta.applied] == ["kv_cache", "width", "depth", "depth"]

    (tmp_path / "plan.json").write_text(
        '{"prune": "kv_cache 0.25", "layers": {"1,3": "width mlp=0.25", "2": "depth"}}'
    )
    found = read_steps(str(tmp_path / "plan.json"))
    assert list(map(str, found)) == ["kv_cache 0.25", "width mlp=0.25 layers=1,3", "depth layers=2"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "1:1: file: expected the keys layers or prune"),
        ("layers:\n  4-: depth\n", "2:3: layers.4-: expected layer numbers such as 4-29"),
        ("layers:\n  4: depth\n  3-5: depth\n", "3:3: layers.3-5: layer 4 is listed twice"),
        (
            "layers:\n  4: width mpl=0.3\n",
            "2:12: layers.4: part or option of width 'mpl' is unknown; did you mean mlp",
        ),
        (
            "layers:\n  4: width mlp=0.3 layers=4\n",
            "2:20: layers.4: expected no layers, as the key",
        ),
        ("layers:\n  4: shortgpt 0.25\n", "2:6: layers.4: method shortgpt selects its own layers"),
        ("layer:\n  4: depth\n", "1:1: layer: is unknown; expected layers or prune"),
    ],
)
def test_mistakes_in_a_plan_have_their_place(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "plan.yaml"
    path.write_text(text)
    with pytest.raises(InputError) as found:
        read_steps(str(path))
    assert str(found.value).startswith(f"{path}:{message}")


def test_ranges_that_overlap_do_not_fill_the_memory(tmp_path: Path) -> None:
    path = tmp_path / "plan.yaml"
    path.write_text("layers:\n" + "".join(f"  0-9999,{i}: depth\n" for i in range(1000)))
    tracemalloc.start()
    with pytest.raises(InputError, match=r"3:3: layers\.0-9999,1: layer 0 is listed twice"):
        read_steps(str(path))
    assert tracemalloc.get_traced_memory()[1] < 20e6
    tracemalloc.stop()
