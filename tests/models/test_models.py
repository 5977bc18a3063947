"""Named models and config.json: counts equal the published counts, and wrong files are refused in
one line."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
from model_shapes import COUNTED, PUBLISHED, outer_tensors, parameters_of
from shaped import Experts, value_of
from tables import tables_of

from simulator.codes import Kernel
from simulator.errors import InputError
from simulator.models.library import (
    MAX_FILE_BYTES,
    from_hf_config,
    list_models,
    load_model,
    read_config,
)
from simulator.models.lower import lower
from simulator.models.pass_rows import COMPRESSED
from simulator.prediction.table import table

pytestmark = pytest.mark.quick

SHIPPED = Path(__file__).parents[2] / "simulator/models"
LLAMA: dict[str, Any] = tables_of("models/configs.yaml")["bases"]["models_llama"]
CASES = tables_of("models/cases.yaml")


def test_every_shipped_model_has_published_numbers_and_names_its_source() -> None:
    assert set(list_models()) == {*PUBLISHED, *COUNTED}
    for file in SHIPPED.glob("*.json"):
        assert json.loads(file.read_text())["_source"].startswith("https://huggingface.co/"), file


@pytest.mark.parametrize("name", sorted(PUBLISHED))
def test_parameters_equal_the_published_count_and_the_tensors(name: str) -> None:
    p, model = PUBLISHED[name], load_model(name)
    in_layers = parameters_of(p, p.experts)
    assert in_layers + sum(math.prod(s) for s in outer_tensors(p)) == p.parameters
    assert model.parameters == p.parameters
    assert model.layer_parameters == in_layers
    assert (model.hidden, len(model.layers), model.heads, model.kv_heads) == (
        p.hidden,
        p.layers,
        p.heads,
        p.kv_heads,
    )
    assert (model.head_dim, model.inner, model.vocab, model.tied) == (
        p.head_dim,
        p.inner,
        p.vocab,
        p.tied,
    )


@pytest.mark.parametrize("name", COUNTED)
def test_parameters_of_hybrids_and_new_types_equal_the_published_count(name: str) -> None:
    model = load_model(name)
    experts = [s for s in model.sublayers if isinstance(s, Experts)]
    # most classes of Transformers store the biases of routers as buffers
    biases = sum(one.routes for one in experts if one.router_bias)
    assert model.parameters in (COUNTED[name], COUNTED[name] + biases)


@pytest.mark.parametrize("name", sorted(name for name, p in PUBLISHED.items() if p.experts))
def test_active_parameters_equal_the_tensors_and_the_published_digits(name: str) -> None:
    p, model = PUBLISHED[name], load_model(name)
    exact = p.parameters - parameters_of(p, p.experts) + parameters_of(p, p.active)
    assert model.active_parameters == exact
    published, digit = p.active_parameters
    # rounded, or cut
    assert abs(exact - (not p.embedded) * p.vocab * p.hidden - published * 1e9) < digit * 1e9
    assert (model.experts, model.active, model.expert_inner) == (
        p.experts,
        p.active,
        p.expert_inner,
    )


@pytest.mark.parametrize(("given_name", "name"), [*CASES["names"].items()])
def test_names_and_ids(given_name: str, name: str) -> None:
    assert load_model(given_name) is load_model(name)
    assert load_model(name).name == name


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("lama-2-7b", "model 'lama-2-7b' is unknown; did you mean llama-2-7b"),
        (
            "nofolder",
            "model 'nofolder' is unknown. No folder or file has this path. Known: bamba",
        ),
        ("x" * 5000, "is unknown. No folder or file has this path"),
        *((name, "expected a name or a path") for name in ("", "  ", "a\0b")),
        *(
            (name, f"^{name}: no such file or folder")
            for name in ("no/such/folder", "/no/folder", "nothing.json")
        ),
        ("./" + "x" * 5000, "cannot be read"),
        *(
            (source, "expected a name, a path or a configuration")
            for source in (None, 3, ["llama-2-7b"], 1.5)
        ),
    ],
)
def test_what_is_no_model_is_refused_in_one_line(source: Any, reason: str) -> None:
    with pytest.raises(InputError, match=reason) as error:
        load_model(source)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("key", [k for k in LLAMA if k != "model_type"])
@pytest.mark.parametrize(
    "value",
    [None, 0, -1, 10**9, 10**400, 1.5, True, "64", [64], float("nan"), float("inf"), "x" * 10_000],
)
def test_bad_shape_is_named(key: str, value: Any) -> None:
    with pytest.raises(InputError) as error:
        from_hf_config(LLAMA | {key: value}, "some/config.json")
    text = str(error.value)
    assert text.startswith(f"some/config.json: {key}: ")
    assert "expected an integer from 1 to" in text
    assert "\n" not in text
    assert len(text) < 200
    with pytest.raises(InputError, match=f"config: {key}: missing"):
        from_hf_config({k: v for k, v in LLAMA.items() if k != key})


@pytest.mark.parametrize("data", [[], "llama", 3, None])
def test_only_an_object_is_a_configuration(data: Any) -> None:
    with pytest.raises(InputError, match="expected a JSON object"):
        from_hf_config(data)


def declaring(structure: Any, key: str = "quantization_config") -> dict[str, Any]:
    """A configuration as compressed-tensors writes it for plain weights."""
    sparsity = {"format": "dense", "global_sparsity": 0.5, "sparsity_structure": structure}
    return LLAMA | {key: {"quant_method": "compressed-tensors", "sparsity_config": sparsity}}


@pytest.mark.parametrize("key", ["quantization_config", "compression_config"])
def test_declared_two_of_four_is_timed_where_there_are_kernels(key: str) -> None:
    dense, pruned = load_model(LLAMA), load_model(declaring("2:4", key))
    assert pruned.declared == "2:4"
    assert (
        "in engines with such kernels (compile, hf, reference, trtllm, vllm@v1), as dense"
        in pruned.found
    )
    projections = 2 * (4 * 64 * 64 + 3 * 64 * 176)
    for engine, dtype, some in (
        ("hf", "bf16", 1),
        ("trtllm", "fp8", 1),
        ("hf", "fp8", 0),
        ("vllm", "bf16", 0),
    ):
        w, whole = (lower(model, seq=64, engine=engine, dtype=dtype) for model in (pruned, dense))
        assert (w.kernel == Kernel.SPARSE24).sum() == some * whole.is_role(*COMPRESSED).sum()
        assert whole.parameters - w.parameters == some * projections / 2
    (record,) = table([dense], ["h100"], pruned=[pruned], engine=["hf"])
    assert (record.family, record.speedup > 0.0) == ("semi_structured", True)
    (record,) = found = table([dense], ["h100"], pruned=[pruned], engine=["vllm"])
    assert record.speedup == 1.0
    assert any("as dense in others" in note for note in found.notes)


@pytest.mark.parametrize("parallel", [True, False])
def test_layers_of_gpt_neox_can_be_parallel(parallel: bool) -> None:
    model = from_hf_config(LLAMA | {"model_type": "gpt_neox", "use_parallel_residual": parallel})
    assert [layer.parallel for layer in model.layers] == [parallel] * 2
    assert from_hf_config(LLAMA | {"model_type": "gpt_neox"}).usual.parallel


def test_the_text_decoder_of_a_multimodal_model_is_read() -> None:
    text = {key: value for key, value in LLAMA.items() if key != "model_type"}
    for kind, decoder, own in (
        ("mistral3", "mistral", {}),
        ("mistral3", "ministral3", {"model_type": "ministral3"}),
        ("qwen2_5_vl", "qwen2_5_vl_text", {"num_key_value_heads": 2}),
        ("qwen3_vl", "qwen3_vl_text", {"num_key_value_heads": 2}),
        ("llava", "llama", {"model_type": "llama"}),  # any other model whose decoder is known
    ):
        inside = text | {"num_key_value_heads": 4} | own
        model = load_model({"model_type": kind, "vision_config": {}, "text_config": inside})
        assert (model.architecture, model.hidden, len(model.layers)) == (decoder, 64, 2)
        assert (
            model.found
            == f"{decoder}: only the text decoder is timed, not the other parts (vision)"
        )
    flat = load_model(
        {**text, "model_type": "qwen2_5_vl", "num_key_value_heads": 4, "vision_config": {}}
    )
    assert (flat.architecture, value_of(flat, "attention.qkv_bias")) == ("qwen2_5_vl_text", True)
    assert "vision" in flat.found
    tied = {
        "model_type": "qwen3_vl",
        "tie_word_embeddings": True,
        "text_config": text | {"num_key_value_heads": 4},
    }
    assert load_model(tied).tied
    with pytest.raises(InputError, match=r"text_config\.vocab_size: missing"):
        load_model(
            {
                "model_type": "mistral3",
                "text_config": {k: v for k, v in text.items() if k != "vocab_size"},
            }
        )


def test_an_unknown_hugging_face_id_reports_how_to_get_its_config() -> None:
    command = r"curl -L https://huggingface.co/{}/resolve/main/config.json -o config.json"
    way = f"get its config.json and pass that path: {command}"
    for name in ("Qwen/Qwen9-8B", "some.one/A_new-model.v2"):
        with pytest.raises(InputError, match=way.format(re.escape(name))):
            load_model(name)
    with pytest.raises(
        InputError, match=r"did you mean qwen3-8b .*No folder or file has this path.*curl"
    ):
        load_model("Qwen/Qwen4-8B")
    for name in ("qwen9", "a/b/c", "x y/z", "a/" + "b" * 200):
        with pytest.raises(InputError) as error:
            load_model(name)
        assert "curl" not in str(error.value)


def test_file_folder_path_and_dictionary_agree(tmp_path: Path) -> None:
    file = tmp_path / "my-model" / "config.json"
    file.parent.mkdir()
    file.write_text(json.dumps(LLAMA))
    model = read_config(file)
    assert model.name == "my-model"
    assert all(
        load_model(source) == model for source in (str(file), file, file.parent, f"{file.parent}/")
    )
    assert load_model(LLAMA).parameters == model.parameters
    file.write_bytes(
        b"\xef\xbb\xbf" + json.dumps(LLAMA | {"_name_or_path": "someone/Nice-1B"}).encode()
    )
    assert load_model(file).name == "Nice-1B"


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b'{"model_type": "llama", "hidden_', r"config.json:1:25: is not JSON"),
        (b"\xff\xfe\x00", "not UTF-8"),
        (b'"text"', "expected a JSON object"),
        (b"{}", "model_type: missing"),
        (b" " * (MAX_FILE_BYTES + 1), "is larger than 1 MB"),
    ],
)
def test_bad_files(tmp_path: Path, content: bytes, reason: str) -> None:
    file = tmp_path / "config.json"
    for source, wrong in ((tmp_path, r"the folder has no config\.json"), (file, "no such file")):
        with pytest.raises(InputError, match=wrong):
            load_model(source)
    file.write_bytes(content)
    with pytest.raises(InputError, match=reason) as error:
        load_model(file)
    assert "\n" not in str(error.value)
    assert "config.json" in str(error.value)
