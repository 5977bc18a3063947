"""Number formats are those that a configuration states, for a model and for ``--pruned``; what is
not understood is refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from layouts import folder_of, save, stored_as, tensors_of
from program import Program
from tables import tables_of

import simulator
from simulator.codes import DTYPES, Kernel
from simulator.errors import InputError
from simulator.models.library import load_model
from simulator.models.lower import lower
from simulator.models.model import Model
from simulator.prediction.table import table

pytestmark = pytest.mark.quick

LLAMA = load_model("llama-2-7b")


CASES: dict[str, tuple[dict[str, Any], str, str, str, str]] = tables_of("models/configs.yaml")[
    "formats"
]

UNREAD = tables_of("models/configs.yaml")["unread_formats"]

WRONG = tables_of("models/configs.yaml")["wrong_formats"]


def config(stored: Any, key: str = "quantization_config") -> dict[str, Any]:
    content = json.loads((Path(simulator.__file__).parent / "models/llama-2-7b.json").read_text())
    return {**content, "_name_or_path": "me/stored", key: stored}


def formats_of(model: Model, **asked: Any) -> tuple[str, str, str]:
    """Formats of weights, arithmetic and cache of the operators of a model."""
    w = lower(model, phase="decode", engine="reference", **asked)
    product, attention = w.take(w.is_role("down")), w.take(w.is_role("attention"))
    head = w.take(w.is_role("lm_head"))
    assert {DTYPES[c] for c in (*head.dtype, *head.weight_dtype, *attention.dtype)} == {"bf16"}
    codes = product.weight_dtype[0], product.dtype[0], attention.weight_dtype[0]
    weights, arithmetic, cache = (DTYPES[code] for code in codes)
    return weights, arithmetic, cache


@pytest.mark.parametrize("name", CASES)
def test_the_formats_of_a_configuration_count(name: str, tmp_path: Path) -> None:
    stored, *formats, note = CASES[name]
    folder = tmp_path / "stored"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config(stored)))
    older = load_model(config(stored, "compression_config"))
    for model in (load_model(config(stored)), older, load_model(folder)):
        assert formats_of(model) == tuple(formats)
        assert note in model.found
        assert bool(model.found) is bool(note)
        assert model.layers == LLAMA.layers


@pytest.mark.parametrize("name", CASES)
def test_a_pruned_checkpoint_is_as_fast_as_its_formats(name: str) -> None:
    stored, weights, arithmetic, cache, _ = CASES[name]
    asked = {"dtype": arithmetic, "weight_dtype": weights, "kv_dtype": cache}
    request: dict[str, Any] = {"engine": "reference", "batch": 4, "phase": ["prefill", "decode"]}
    found = table(LLAMA, "b200", pruned=[load_model(config(stored))], **request)
    for r in found:
        once = {"engine": r.engine, "batch": r.batch, "phase": r.phase}
        alone = simulator.predict(LLAMA, "depth 0.25", "b200", **once, **asked)
        assert r.pruned_s == pytest.approx(alone.dense_s, rel=1e-12)
        assert (r.dtype, r.weight_dtype, r.kv_dtype) == ("bf16",) * 3
        assert r.formats.startswith(arithmetic)
        assert r.formats.endswith(" against bf16")
        assert ("with" in r.formats) is (weights != arithmetic or cache != "bf16")


def test_the_program_names_the_formats(cli: Program, tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    file.write_text(json.dumps(config(CASES["FP8 with a cache"][0])))
    out = cli.out(f"models show {file}")
    assert "number formats: weights, arithmetic and K/V cache in fp8\n" in out
    line = f"speedup llama-2-7b --pruned {file} --hardware h100"
    out, err = cli(line)
    assert out.startswith("stored makes llama-2-7b 1.5")
    assert "fp8 with fp8 cache against bf16" in " ".join(out.split())
    assert "note: stored: weights, arithmetic and K/V cache in fp8\n" in err
    out, err = cli(f"{line} --dtype bf16 --kv-dtype bf16 --verbose")
    assert "bf16 with fp8 weights against bf16" in " ".join(out.split())
    stated = "stored states weights, arithmetic and K/V cache in fp8, but"
    assert err.count(f"note: {stated} --dtype bf16 --kv-dtype bf16 counts\n") == 1
    err = cli(f"{line} --weight-dtype int4 --verbose")[1]
    assert err.count(f"note: {stated} --weight-dtype int4 counts\n") == 1
    on_a100 = line.replace("h100", "a100")
    out, err = cli(on_a100)
    assert "bf16 with fp8 weights and fp8 cache against bf16" in " ".join(out.split())
    assert (
        "note: a100_sxm_80gb has no fp8 arithmetic: vllm computes in bf16 with fp8 weights" in err
    )
    err = cli(f"{on_a100} --engine hf", status=2)[1]
    alone = "for fp8 weights alone: --dtype bf16 (and --weight-dtype fp8 if the checkpoint does"
    assert (
        f"a100_sxm_80gb has no fp8 arithmetic; it has fp32, tf32, fp16, bf16, int8; {alone}" in err
    )
    assert err.count("\n") == 1
    blocks = config(CASES["fp8 (DeepSeek-V3)"][0])
    (tmp_path / "blocks.json").write_text(json.dumps(blocks))
    line = f"speedup {tmp_path}/blocks.json --family depth --hardware a100 --dtype bf16"
    err = cli(f"{line} --engine trtllm", 2)[1]
    alone = (
        "it has: fp8, int8, int4; --dtype fp8 computes in them, and --weight-dtype fp8 runs alone"
    )
    assert err == f"prunesim: trtllm has no kernels for fp8_block weights alone; {alone}\n"
    assert "bf16, weights fp8_block" in cli.out(line)


def test_what_the_request_states_wins() -> None:
    fp8, awq = (load_model(config(CASES[name][0])) for name in ("fp8 (AutoFP8)", "awq"))
    assert formats_of(fp8, dtype="bf16") == ("fp8", "bf16", "bf16")
    assert formats_of(fp8, weight_dtype="fp8") == ("fp8", "fp8", "bf16")
    # the arithmetic of the checkpoint belongs to its own weights
    assert formats_of(fp8, weight_dtype="int4") == ("int4", "bf16", "bf16")
    assert formats_of(fp8, dtype="int8", weight_dtype="int8") == ("int8", "int8", "bf16")
    assert formats_of(awq, dtype="fp8", kv_dtype="fp8") == ("int4", "fp8", "fp8")
    r = table(fp8, "h100", prune=["depth 0.25"])[0]
    assert (r.dtype, r.weight_dtype, r.formats) == ("fp8", "fp8", "")
    dense = table(fp8, "h100", pruned=[LLAMA])
    assert dense[0].formats == "bf16 against fp8"
    assert "llama-2-7b: weights and arithmetic in 16 bits" in dense.notes


@pytest.mark.parametrize("reason", UNREAD)
def test_formats_that_are_not_understood_are_refused_by_name(
    reason: str, cli: Program, tmp_path: Path
) -> None:
    file = tmp_path / "config.json"
    file.write_text(json.dumps(config(UNREAD[reason])))
    model = load_model(file)
    assert (model.unread_format, model.weight_dtype, model.dtype) == (reason, "", "")
    for line in (f"speedup {file} --prune 'depth 0.25'", f"speedup llama-2-7b --pruned {file}"):
        err = cli(f"{line} --hardware h100", status=2)[1]
        assert (
            f"stored: {reason} is not understood; state the format of its weights, such as" in err
        )
        assert err.endswith(" --weight-dtype int4\n")
    cli(f"speedup {file} --prune 'depth 0.25' --hardware h100 --weight-dtype int4")
    assert f"number formats: {reason} is not understood\n" in cli.out(f"models show {file}")


def test_a_pruned_checkpoint_of_an_unknown_format_is_excluded_beside_others() -> None:
    models = [load_model({**config(UNREAD["quant_method 'hqq'"]), "_name_or_path": "hqq"})]
    models.append(load_model(config(CASES["awq"][0])))
    found = table(LLAMA, "h100", pruned=models)
    assert [r.pruned for r in found] == ["stored"]
    assert any(note.startswith("hqq: quant_method 'hqq' is not und") for note in found.notes)


@pytest.mark.parametrize("reason", WRONG)
def test_what_is_no_such_object_is_refused_with_its_place(reason: str) -> None:
    with pytest.raises(InputError) as error:
        load_model(config(WRONG[reason]))
    assert str(error.value) == f"config: {reason}"


@pytest.mark.parametrize("empty", [None, {}, [], ""])
def test_an_empty_object_states_nothing(empty: Any) -> None:
    assert load_model({**config(empty), "_name_or_path": "llama-2-7b"}) == LLAMA


def test_modelopt_states_formats_in_a_file_of_its_own(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, "llama-2-7b")
    beside = folder / "hf_quant_config.json"
    beside.write_text(json.dumps({"quantization": {"quant_algo": "FP8", "exclude_modules": []}}))
    assert formats_of(load_model(folder)) == ("fp8", "fp8", "bf16")
    assert load_model(folder / "config.json") == LLAMA  # asked for alone
    beside.write_text("[1]")
    with pytest.raises(
        InputError, match=r"hf_quant_config\.json: expected a JSON object, got \[1\]"
    ):
        load_model(folder)
    content = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(
        json.dumps(content | {"quantization_config": {"quant_method": "awq", "bits": 4}})
    )
    assert formats_of(load_model(folder))[0] == "int4"  # config.json counts


@pytest.mark.parametrize(
    ("name", "layout", "arithmetic", "note"),
    [
        ("FP8 dynamic", "fp8", "fp8", ""),
        ("fp8 (DeepSeek-V3)", "fp8_block", "fp8", ""),
        ("gptq 8", "gptq8", "", ""),
        ("awq", "fp8", "", "weights in fp8; --dtype fp8 computes in it"),
    ],
)
def test_the_arithmetic_of_a_folder_is_that_of_its_tensors(
    name: str, layout: str, arithmetic: str, note: str, tmp_path: Path
) -> None:
    folder = folder_of(tmp_path, "llama-2-7b")
    save(folder / "model.safetensors", stored_as(layout, tensors_of(LLAMA)))
    content = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(
        json.dumps(content | {"quantization_config": CASES[name][0]})
    )
    model = load_model(folder)
    assert model.dtype == arithmetic
    assert model.found == (f"{model.name} by its tensors: {note}" if note else "")


def test_declared_two_of_four_goes_with_formats() -> None:
    sparse = {"format": "sparse-24-bitmask", "sparsity_structure": "2:4"}
    model = load_model(config(CASES["FP8 dynamic"][0] | {"sparsity_config": sparse}))
    assert (model.declared, model.weight_dtype, model.dtype) == ("2:4", "fp8", "fp8")
    for engine, kernel in (("vllm@v1", Kernel.SPARSE24), ("vllm", Kernel.DENSE)):
        w = lower(model, engine=engine)
        assert (w.kernel[w.is_role("down")] == kernel).all()
    r = table(LLAMA, "h100", pruned=[model], engine="vllm@v1", phase="prefill")[0]
    assert (r.family, r.formats) == ("semi_structured", "fp8 against bf16")


def test_pruning_and_writing_keep_the_formats(tmp_path: Path) -> None:
    model = load_model(config(CASES["fp8 (AutoFP8)"][0]))
    pruned = simulator.prune(lower(model), "width", 0.25).meta.config
    assert (pruned.weight_dtype, pruned.dtype) == ("fp8", "fp8")
    r = simulator.predict(model, "width 0.25", "h100")
    assert r.dtype == "fp8"
