"""A checkpoint is read from the headers of its tensors; an invalid one is refused in one line."""

from __future__ import annotations

import json
import os
import tracemalloc
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from layouts import folder_of, save, save_shards, stored_as, tensors_of, write
from shaped import Layer, changed, cut, each_sublayer, layer, model_of, resized
from tables import tables_of

from simulator.codes import DTYPES, Kernel
from simulator.errors import InputError
from simulator.models.checkpoint import MAX_HEADER_BYTES, NAMED, Tensor, from_tensors
from simulator.models.form import SPARSE24
from simulator.models.library import FOLDER, list_models, load_model
from simulator.models.lower import lower
from simulator.models.model import Model
from simulator.models.sublayers import LatentAttention
from simulator.prediction.table import table

CASES = tables_of("models/cases.yaml")
LLAMA = load_model("llama-2-7b")
# widths of Mistral-7B and of Qwen3-8B
EIGHT = {"experts": 8, "active": 2.0, "inner": 14336}
MIXTRAL = model_of(
    *[layer(32, 8, experts=EIGHT)] * 32, hidden=4096, vocab=32000, architecture="mixtral"
)
SMALL = {"hidden": 4096, "vocab": 151936}


def held(tensors: Mapping[str, Tensor]) -> int:
    """Parameters by the headers of floats: all but buffers."""
    buffers = ("inv_freq", "attention.bias", "masked_bias")
    return sum(t.elements for name, t in tensors.items() if not name.endswith(buffers))


def cut_heads(one: Layer, heads: int) -> Layer:
    return cut(one, "attention", heads=heads, kv_heads=heads)


def llm_pruner(i: int, one: Layer) -> Layer:
    return cut(cut_heads(one, 26), "mlp", inner=8810) if 4 <= i < 30 else one


def test_the_checkpoint_of_llm_pruner_is_predicted_as_it_is(tmp_path: Path) -> None:
    folder, tensors = folder_of(tmp_path, "llama-2-7b"), tensors_of(changed(LLAMA, llm_pruner))
    save(folder / "model.safetensors", tensors)
    whole = load_model(folder)
    (folder / "model.safetensors").unlink()
    save_shards(folder, tensors, 3)
    # not in the index
    save(folder / "left-over.safetensors", {"x.layers.0.weight": Tensor("F16", (1,))})
    for model in (whole, load_model(str(folder))):
        assert model.layers == changed(LLAMA, llm_pruner).layers
        assert (
            model.parameters
            == 5_709_025_280
            == int(lower(model, phase="decode", engine="hf").parameters)
        )
        widths = (
            "width in layers 4-29: 26 of 32 heads, 26 of 32 key/value heads, an MLP of 8,810 of"
            " 11,008 "
        )
        assert (
            widths + "(15.3 % of the parameters); 5,709,025,280 parameters, 6,738,415,616 in the"
            in model.found
        )
    assert load_model(folder / "config.json").parameters == 6_738_415_616  # asked for alone
    found = table([str(folder)], ["h100"], ["depth"], [0.25])
    assert found.notes[0] == whole.found
    ratio = table([LLAMA], ["h100"], ["depth"], [0.25])[0].dense_s / found[0].dense_s
    assert 1.0 < ratio < 6.738 / 5.709


@pytest.mark.parametrize("name", [n for n in list_models() if load_model(n).architecture in NAMED])
def test_a_checkpoint_that_is_what_its_config_says_is_that(name: str) -> None:
    model = load_model(name)
    tensors = tensors_of(model)
    found = from_tensors(model, tensors, "x")
    assert found == replace(model, weight_dtype="")  # gpt-oss's tensors are 16 bits here
    wide = f"{model.name} by its tensors: weights in 16 bits" if model.weight_dtype else ""
    assert (found.found, found.parameters) == (model.found or wide, held(tensors))
    if model.tied:  # a head that is stored all the same counts once
        again = from_tensors(
            model, tensors | {"lm_head.weight": Tensor("F16", (model.vocab, model.hidden))}, "x"
        )
        assert again == model


LATENT = LatentAttention(heads=8, query_rank=96, rank=64, rotary=16, plain=32, value=24)
ROUTED = {"experts": 8, "active": 2.0, "inner": 64, "shared_inner": 64, "router_bias": True}
DEEPSEEK = model_of(
    layer(inner=512).with_part("attention", LATENT),
    *[layer(experts=ROUTED).with_part("attention", LATENT)] * 3,
    **{**SMALL, "hidden": 256, "architecture": "deepseek_v3"},
)
SHARED = {"experts": 8, "active": 2.0, "inner": 96, "shared_inner": 12288, "shared_gate": True}
QWEN = model_of(
    *[layer(32, 8, experts=SHARED, attention={"norm": "head"})] * 4,
    **{**SMALL, "architecture": "qwen2_moe"},
)
BIASED = {"experts": 8, "active": 2.0, "inner": 96, "router_bias": True, "bias": True}
SINKS = {"sinks": True, "qkv_bias": True, "o_bias": True}
OSS = model_of(
    *[layer(32, 8, experts=BIASED, attention=SINKS)] * 4, **{**SMALL, "architecture": "gpt_oss"}
)
PHI, OPT, NEOX = map(load_model, ("phi-3-mini-4k", "opt-13b", "pythia-6.9b"))


def without_some(i: int, one: Layer) -> Layer:
    return one.without("attention") if i > 28 else one.without("mlp") if i == 3 else one


def linear_some(i: int, one: Layer) -> Layer:
    if i < 3:
        return layer(inner=11008, linear=("attention",))
    return layer(32, 32, linear=("mlp",)) if i == 9 else one


def six_experts(i: int, one: Layer) -> Layer:
    one = cut(one, "attention", heads=6)
    return cut(one, "mlp", experts=6) if i else one


CUT = {
    "flap": (
        LLAMA,
        changed(
            LLAMA, lambda i, one: cut(cut_heads(one, 32 - i // 2), "mlp", inner=11008 - 97 * i)
        ),
    ),
    "flap with its biases": (
        LLAMA,
        resized(LLAMA, inner=9000, down_bias=True, o_bias=True),
    ),
    "shortgpt, numbered as before": (
        LLAMA,
        LLAMA.with_layers(LLAMA.layers[:23], (*range(21), 30, 31)),
    ),
    "shortgpt, numbered anew": (LLAMA, LLAMA.with_layers(LLAMA.layers[:23])),
    "slicegpt": (LLAMA, replace(LLAMA, hidden=3072)),
    "attention and MLPs dropped": (LLAMA, changed(LLAMA, without_some)),
    "one product in place of a sublayer": (LLAMA, changed(LLAMA, linear_some)),
    "a smaller vocabulary": (LLAMA, replace(LLAMA, vocab=30000)),
    "phi": (PHI, changed(PHI, lambda i, one: cut(one, "mlp", inner=4000 + i))),
    "opt": (OPT, changed(OPT, lambda i, one: cut_heads(one, 20 + i % 9))),
    "neox": (NEOX, changed(NEOX, lambda i, one: cut(one, "mlp", inner=9000 + 2 * i))),
    "mixtral": (MIXTRAL, resized(MIXTRAL, experts=6)),
    "qwen moe": (
        QWEN,
        changed(QWEN, lambda i, one: cut(one, "mlp", experts=4 + i, shared_inner=64)),
    ),
    "deepseek": (DEEPSEEK, changed(DEEPSEEK, six_experts)),
    "deepseek of a smaller rank": (DEEPSEEK, resized(DEEPSEEK, query_rank=80, rank=48)),
    "gpt-oss": (OSS, resized(OSS, experts=6)),
}


@pytest.mark.parametrize("case", CUT)
def test_pruned_checkpoints_are_predicted_as_they_are(case: str) -> None:
    dense, pruned = CUT[case]
    tensors = tensors_of(pruned)
    for config in (dense, pruned):  # the config.json of the dense model, and a corrected one
        if config is dense or not pruned.numbers:
            found = from_tensors(config, tensors, "x")
            assert found.layers == pruned.layers
            assert found.parameters == pruned.parameters == held(tensors)
            assert bool(found.found) is (config is dense)
            for phase in ("prefill", "decode"):
                assert int(lower(found, phase=phase, seq=64).parameters) == found.parameters
    assert from_tensors(dense, tensors_of(dense), "x") == dense


FORMATS = CASES["layouts"]


def halved(model: Model) -> Model:
    """The model with 2:4 in all projections."""
    return each_sublayer(model, lambda s: s.with_forms(dict.fromkeys(s.weights(1), SPARSE24)))


@pytest.mark.parametrize("layout", FORMATS)
def test_packed_weights_are_read_by_their_tensors(layout: str, tmp_path: Path) -> None:
    dtype, sparse24 = FORMATS[layout]
    folder = folder_of(tmp_path, "llama-2-7b")
    for inner in (11008, 8704):
        stored = resized(LLAMA, inner=inner, weight_dtype=dtype)
        save(folder / "model.safetensors", stored_as(layout, tensors_of(stored)))
        model = load_model(folder)
        assert model == (halved(stored) if sparse24 else stored)
        w = lower(model, engine="trtllm")
        gemms = w.is_role("qkv", "o", "down")
        assert {DTYPES[code] for code in w.weight_dtype[gemms]} == {dtype or "bf16"}
        assert (w.kernel[gemms] == Kernel.SPARSE24).all() == sparse24
    assert (f"weights in {dtype}" in model.found) is bool(dtype)
    assert ("semi_structured: 2:4" in model.found) is sparse24


def test_mxfp4_of_gpt_oss_has_the_shapes_of_its_experts() -> None:
    stored = {}
    for name, t in tensors_of(OSS).items():
        if t.shape[:1] == (8,) and len(t.shape) == 3:
            e, inputs, outputs = t.shape
            stored[f"{name}_blocks"] = Tensor("U8", (e, outputs, inputs // 32, 16))
            stored[f"{name}_scales"] = Tensor("U8", (e, outputs, inputs // 32))
        else:
            stored[name] = t
    found = from_tensors(OSS, stored, "x")
    assert found == replace(OSS, weight_dtype="mxfp4")
    assert "weights in mxfp4" in found.found


F16 = lambda *shape: Tensor("F16", shape)  # noqa: E731


@pytest.mark.parametrize(("change", "says"), CASES["tensors"])
def test_what_cannot_be_explained_is_refused_by_its_tensor(
    change: dict[str, list[Any] | None], says: str
) -> None:
    tensors = {name: t for name, t in tensors_of(LLAMA).items() if name not in change}
    tensors |= {name: Tensor(t[0], tuple(t[1:])) for name, t in change.items() if t}
    with pytest.raises(InputError, match=says) as caught:
        from_tensors(LLAMA, tensors, "folder")
    assert str(caught.value).startswith("folder: ")


def sliced(hidden: int, head: int, layers: int = 32) -> dict[str, Tensor]:
    """Return LLaMA-2-7B as SliceGPT saves it: norms without weights, and a full head or a sliced
    one."""
    out = {"model.embed_tokens.weight": F16(32000, hidden), "lm_head.weight": F16(32000, head)}
    for i in range(layers):
        at, after = f"model.layers.{i}.", head if i == layers - 1 else hidden
        out |= {f"{at}self_attn.{name}_proj.weight": F16(4096, hidden) for name in "qkv"}
        out |= {f"{at}mlp.{name}_proj.weight": F16(11008, hidden) for name in ("gate", "up")}
        out |= {
            at + "self_attn.o_proj.weight": F16(hidden, 4096),
            at + "mlp.down_proj.weight": F16(after, 11008),
        }
        out |= {
            at + "attn_shortcut_Q": F16(hidden, hidden),
            at + "mlp_shortcut_Q": F16(hidden, after),
        }
    return out


@pytest.mark.parametrize("head", [4096, 3072])
def test_slicegpt_is_read_with_the_matrices_of_its_residual(head: int) -> None:
    tensors = sliced(3072, head)
    found = from_tensors(LLAMA, tensors, "x")
    assert found.parameters == held(tensors)
    assert (found.hidden, found.head_hidden, found.norm, found.head_dim) == (
        3072,
        head,
        "none",
        128,
    )
    assert "width_cross: hidden 3,072 of 4,096, 64 residual projections" in found.found
    for phase in ("prefill", "decode", "generate"):
        for engine in ("vllm", "hf"):
            w = lower(
                found,
                phase=phase,
                batch=2,
                seq=64,
                new_tokens=2 * (phase == "generate"),
                engine=engine,
            )
            assert w.parameters == pytest.approx(found.parameters, rel=1e-12)
            added = w.take(w.is_role("residual_projection"))
            assert added.overhead.all()
            runs = 1 + 2 * (phase == "generate")
            assert added.count.sum() == 64 * runs
            assert (added.n * added.count).sum() == (63 * 3072 + head) * runs
            assert set(added.k) == {3072}
            assert set(w.k[w.is_role("lm_head")]) == set(w.n[w.is_role("final_norm")]) == {head}
    (record,) = table([LLAMA], ["h100"], pruned=[found], phase=["decode"])
    assert record.family == "width_cross"


def factored(
    tensors: dict[str, Tensor], rank: Callable[[str], int], style: str
) -> dict[str, Tensor]:
    """Projections with a rank as their two factors, by the names of a method."""
    out: dict[str, Tensor] = {}
    for name, t in tensors.items():
        module = name.removesuffix(".weight")
        if "_proj" not in name or not (r := rank(module)):
            out[name] = t
        elif style == "svd-llm":
            base = module.removesuffix("_proj")
            out |= {
                base + "_u_proj.weight": F16(t.shape[0], r),
                base + "_v_proj.weight": F16(r, t.shape[1]),
            }
        else:
            out |= {
                module + ".ALinear.weight": F16(t.shape[0], r),
                module + ".BLinear.weight": F16(r, t.shape[1]),
            }
    return out


@pytest.mark.parametrize("style", ["svd-llm", "asvd"])
def test_factors_of_a_projection_are_two_products(style: str) -> None:
    mistral = load_model("mistral-7b-v0.3")
    ranks = {
        "q_proj": 1024,
        "k_proj": 409,
        "up_proj": 2000,
        "down_proj": 1800,
        "o_proj": 1024,
        "gate_proj": 2000,
    }
    tensors = factored(
        tensors_of(mistral), lambda module: ranks.get(module.rsplit(".", 1)[-1], 0), style
    )
    found = from_tensors(mistral, tensors, "x")
    assert found.parameters == held(tensors) < mistral.parameters
    assert (
        "low_rank in layers 0-31: ranks of 409 to 2,000 in down, gate, k, o, q, up (" in found.found
    )
    for engine in ("vllm", "hf"):
        w = lower(found, batch=2, seq=64, engine=engine)
        assert w.parameters == found.parameters
        assert not w.is_role("qkv", "gate_up").any()
        for role, n, k in (
            ("q", 4096, 4096),
            ("k", 1024, 4096),
            ("down", 4096, 14336),
            ("up", 14336, 4096),
        ):
            rank, rows = ranks[role + "_proj"], w.take(w.is_role(role))
            assert list(zip(rows.stage, rows.n, rows.k)) == [(1, rank, k), (2, n, rank)]
        assert w.stage[w.is_role("v")].tolist() == [0]
    (record,) = table([mistral], ["h100"], pruned=[found])
    assert record.family == "low_rank"
    half = lower(found, batch=2, seq=64, engine="hf", devices=2)
    assert half.k[half.is_role("o")].tolist() == [2048, 1024]  # inputs shared out, then the rank


def test_an_adapter_and_pickles_are_named_and_a_config_alone_is_read(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, "llama-2-7b")
    assert load_model(folder) == LLAMA
    (folder / "pytorch_model-00001-of-00002.bin").touch()
    with pytest.raises(
        InputError, match=r"'pytorch_model-00001-of-00002.bin' is a pickle, .*save_model"
    ):
        load_model(folder)
    (folder / "config.json").rename(folder / "adapter_config.json")
    with pytest.raises(InputError, match=r"no config\.json; it holds a PEFT adapter: merge it"):
        load_model(folder)


@pytest.mark.parametrize(("name", "made", "formats"), CASES["transformers_formats"])
def test_the_classes_of_transformers_write_what_is_read(
    name: str, made: dict[str, Any], formats: list[str]
) -> None:
    classes = pytest.importorskip("transformers.utils.quantization_config")
    stored = json.loads(json.dumps(getattr(classes, name)(**made).to_dict(), default=str))
    content = json.loads((FOLDER / "llama-2-7b.json").read_text())
    model = load_model({**content, "quantization_config": stored})
    assert [model.weight_dtype, model.dtype] == formats
    assert bool(model.unread_format) is (formats == ["", ""])


def test_links_of_a_cache_work_and_others_tell_nothing(tmp_path: Path) -> None:
    blobs, folder = tmp_path / "blobs", tmp_path / "snapshots" / "0"
    blobs.mkdir()
    folder.mkdir(parents=True)
    save(blobs / "a", tensors_of(LLAMA))
    (folder_of(tmp_path, "llama-2-7b") / "config.json").rename(blobs / "b")
    link = folder / "model.safetensors"
    link.symlink_to("../../blobs/a")
    (folder / "config.json").symlink_to("../../blobs/b")
    assert load_model(folder) == LLAMA
    for target in (
        "/etc/passwd",
        "/dev/zero",
        "/proc/self/environ",
        "model.safetensors",
        "/nowhere",
    ):
        link.unlink()
        link.symlink_to(target)
        with pytest.raises(
            InputError,
            match=r"its header would not fit into it$|'model.safetensors' is not a file",
        ):
            load_model(folder)


@pytest.mark.parametrize("kind", ["link", "pipe"])
def test_an_index_that_cannot_be_read_does_not_count_as_absent(kind: str, tmp_path: Path) -> None:
    folder = folder_of(tmp_path, "llama-2-7b")
    save(folder / "model.safetensors", tensors_of(LLAMA))
    index = folder / "model.safetensors.index.json"
    index.symlink_to("/nowhere") if kind == "link" else os.mkfifo(index)
    with pytest.raises(InputError, match=r"model.safetensors.index.json: cannot be read: "):
        load_model(folder)


def entry(**changes: Any) -> bytes:
    value = {"dtype": "F16", "shape": [2, 2], "data_offsets": [0, 8]} | changes
    return json.dumps({"a": value}).encode()


TWO = {"dtype": "F16", "shape": [2], "data_offsets": [0, 4]}


@pytest.mark.parametrize(
    ("header", "length", "says"),
    [
        (b"", 2**60, "its header would not fit"),
        (b"version https://git-lfs.github.com/spec/v1", 0x206E6F6973726576, "Git LFS pointer"),
        (
            b" " * (MAX_HEADER_BYTES + 1),
            None,
            "expected a header of at most 8,000,000 bytes, got 8,000,001",
        ),
        (b"[" * 1_000_000, None, "invalid JSON in header"),
        (b'{"a": [' + b"0," * 10**6 + b"0]}", None, "invalid JSON in header"),
        (entry(dtype="F17"), None, "unknown variant `F17`"),
        (entry(dtype="C64", shape=[1]), None, "tensor 'a': dtype 'C64' is unknown"),
        (entry(shape=[-2, -2]), None, "integer `-2`, expected usize"),
        (entry(shape=[2**40, 2**40]), None, "overflow computing buffer size"),
        (entry(shape=[1] * 8 + [4]), None, "expected a shape"),
        (entry(data_offsets=[0, 2**50]), None, "invalid"),
        (
            json.dumps({"a": TWO, "b": TWO | {"data_offsets": [2, 6]}}).encode(),
            None,
            "invalid offset for tensor `b`",
        ),
        (
            json.dumps({"a": TWO}).encode(),
            None,
            "is not a safetensors file: .*file not fully covered",
        ),
    ],
)
def test_hostile_headers_are_refused_in_one_line(
    tmp_path: Path, header: bytes, length: int | None, says: str
) -> None:
    folder = folder_of(tmp_path, "llama-2-7b")
    write(folder / "model.safetensors", header, 8 if header.startswith(b"{") else 0, length)
    tracemalloc.start()
    try:
        with pytest.raises(InputError, match=says) as caught:
            load_model(folder)
        assert tracemalloc.get_traced_memory()[1] < 100e6
    finally:
        tracemalloc.stop()
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400
