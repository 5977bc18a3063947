"""Transformers run for real on tiny models: shapes of every static family, phases, and the command
that compares."""

from __future__ import annotations

import json
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from tables import rows_of

torch = pytest.importorskip("torch")
if find_spec("transformers") is None:  # not imported, which takes time
    pytest.skip(
        "transformers is not installed; it comes with the extra transformers",
        allow_module_level=True,
    )

from torch.autograd import DeviceType  # noqa: E402
from torch.autograd.profiler_util import EventList, FunctionEvent  # noqa: E402

from calibration.devices.protocol import Description, Unsupported  # noqa: E402
from calibration.devices.replay import ReplayDevice  # noqa: E402
from calibration.records.store import read_store  # noqa: E402
from calibration.runners import compare as comparing  # noqa: E402
from calibration.runners import hf  # noqa: E402
from calibration.runners.cases import Case, ModelRun, cases_of  # noqa: E402
from calibration.runners.engine import operator_of  # noqa: E402
from calibration.runners.hf import HfRunner, build, check  # noqa: E402
from simulator.errors import InputError  # noqa: E402
from simulator.models.library import load_model  # noqa: E402
from simulator.models.lower import lower  # noqa: E402
from simulator.models.model import Model  # noqa: E402
from simulator.models.write import content_of  # noqa: E402
from simulator.prediction.prunings import Pruning  # noqa: E402
from simulator.pruning import prune  # noqa: E402

SMALL = {"num_hidden_layers": 4, "hidden_size": 64, "intermediate_size": 96, "vocab_size": 128}
HEADS = {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 16}
LLAMA = {**content_of("llama-3.1-8b"), **SMALL, **HEADS}
QWEN = {**content_of("qwen2.5-0.5b"), **SMALL, **HEADS}
QWEN3 = {**content_of("qwen3-8b"), **SMALL, **HEADS}
MOE = {
    **content_of("qwen1.5-moe-a2.7b"),
    **SMALL,
    **HEADS,
    "num_experts": 8,
    "num_experts_per_tok": 2,
}
MOE |= {"moe_intermediate_size": 32, "shared_expert_intermediate_size": 48}


def _built(content: dict[str, Any], text: str, dtype: str = "fp32") -> Any:
    config = load_model(content)
    dense = lower(config, phase="prefill", seq=8, engine="hf", dtype=dtype)
    pruned = prune(dense, text) if text else dense
    return build(ModelRun(config, dtype, "hf", content), pruned, "cpu")


def _shapes(built: Any, layer: int) -> dict[str, tuple[int, ...]]:
    modules = built.model.model.layers[layer].named_modules()
    linear = {name: m for name, m in modules if isinstance(m, torch.nn.Linear)}
    return {
        name.split(".", 1)[1].replace("_proj", ""): (m.out_features, m.in_features)
        for name, m in linear.items()
    }


ON_GPU = {"device_type": DeviceType.CUDA}

PRUNED = """
                              | 4 | q 128 64, k 64 64, down 64 96             |
depth 0.25                    | 3 | q 128 64, k 64 64, down 64 96             |
width mlp=0.5                 | 4 | q 128 64, k 64 64, gate 48 64, down 64 48 |
width attention=0.5           | 4 | q 64 64, k 32 64, o 64 64, down 64 96     |
width heads=0.5               | 4 | q 64 64, k 64 64, o 64 64                 |
width hidden=0.25             | 4 | q 128 48, o 48 128, down 48 96            |
low_rank 0.5                  | 4 | q.0 32 64, q.1 128 32, down.1 64 32       | low rank in 4
width mlp=0.5 layers=0        | 4 | q 128 64, down 64 48                      | other widths of the MLP in 1 layers
depth layers=0 unit=attention | 4 | gate 96 64, down 64 96                    | no attention in 1 layers
depth layers=0 unit=mlp       | 4 | q 128 64, k 64 64                         | no MLP in 1 layers
unstructured 0.5              | 4 | q 128 64, down 64 96                      |
"""
"""Prunings, the layers of the model, shapes of a layer, and what was patched."""


@pytest.mark.parametrize("content", [LLAMA, QWEN, QWEN3], ids=["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize(("text", "layers", "shapes", "patched"), rows_of(PRUNED))
def test_a_pruned_model_has_the_predicted_shapes_and_runs(
    content: dict[str, Any], text: str, layers: str, shapes: str, patched: str
) -> None:
    built = _built(content, text)
    assert len(built.model.model.layers) == int(layers)
    found = _shapes(built, 0)
    for name, *sizes in (shape.split() for shape in shapes.split(", ")):
        assert found[name] == tuple(map(int, sizes))
    assert ("q" in found or "q.0" in found) == ("no attention" not in patched)
    assert built.patched.startswith(patched)
    assert bool(built.patched) == bool(patched)
    with torch.inference_mode():
        logits = built.model(torch.arange(8)[None], use_cache=True, logits_to_keep=1).logits
        tokens = built.model.generate(torch.arange(8)[None], max_new_tokens=3, do_sample=False)
    assert logits.shape == (1, 1, 128)
    assert torch.isfinite(logits).all()
    assert tokens.shape == (1, 11)


def test_fewer_and_narrower_experts_are_configured() -> None:
    assert _built(MOE, "experts 0.5").model.config.num_experts == 4
    narrow = _built(MOE, "width mlp=0.5").model.config
    assert (
        narrow.moe_intermediate_size,
        narrow.shared_expert_intermediate_size,
        narrow.num_experts,
    ) == (16, 32, 8)
    with pytest.raises(InputError, match="experts differ by layer"):
        _built(MOE, "experts 0.5 layers=0-1")


def test_heads_that_do_not_divide_the_hidden_size_are_built_as_mistral() -> None:
    """LlamaConfig of Transformers from 5.5 refuses them; Mistral without windows is the same
    decoder."""
    built = _built(LLAMA, "width attention=0.25")
    assert type(built.model).__name__ == "MistralForCausalLM"
    assert built.model.config.sliding_window is None
    assert _shapes(built, -1)["q"] == (96, 64)


def test_what_transformers_cannot_build_is_refused_by_name() -> None:
    phi = {
        **content_of("phi-3-mini-4k"),
        **SMALL,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
    }
    with pytest.raises(InputError, match="Phi3DecoderLayer of Transformers has no"):
        _built(phi, "low_rank 0.5")
    with pytest.raises(Unsupported, match="sparse tensor cores"):
        _built(LLAMA, "semi_structured 0.5")
    config = load_model(LLAMA)
    with pytest.raises(InputError, match=r"has no config\.json to start from"):
        check(ModelRun(config), lower(config, engine="hf"))


TINY: dict[str, Any] = {
    "model_type": "llama",
    **SMALL,
    "num_hidden_layers": 6,
    "tie_word_embeddings": True,
}
TINY |= {"num_attention_heads": 8, "num_key_value_heads": 4, "max_position_embeddings": 512}
CONFIG = load_model(TINY)
COMPILED = {**TINY, "num_hidden_layers": 1}  # a compiler takes seconds for each kernel


def _cases(engine: str, config: Model = CONFIG, **settings: Any) -> list[Case]:
    runs = comparing.ENGINES[engine]
    usual = {
        "engine": runs.lowered,
        "dtype": "fp32",
        "new_tokens": 4,
        "seq": 16,
        "sparsity": [0.5],
        "family": ["depth"],
    }
    return cases_of(config, {**usual, **settings}, phases=runs.phases)[0]


def _device() -> ReplayDevice:
    return ReplayDevice(description=Description("cpu", "some CPU", {"threads": "1"}))


def _runner(content: dict[str, Any] = TINY, engine: str = "hf") -> HfRunner:
    return HfRunner(_device(), ModelRun(load_model(content), "fp32", engine, content))


def test_decode_counts_the_steps_between_tokens_and_leaves_the_cache_as_it_was() -> None:
    lengths: list[int] = []
    (case,) = _cases("hf", phase="decode")
    runner = _runner()
    runner.prepare(case)
    model = runner.kept["dense"].model
    layer = model.model.layers[0].self_attn
    given = layer.forward

    def noted(*args: Any, **kwargs: Any) -> Any:
        lengths.append(int((kwargs.get("cache") or kwargs.get("past_key_values")).get_seq_length()))
        return given(*args, **kwargs)

    layer.forward = noted
    with torch.inference_mode():
        sample = hf.eager_sampler(runner.kept["dense"], case)
        sample(2)
    prompt, *steps = lengths
    once = hf.TOKENS + 1  # the first token warms up, then come those that are timed
    assert prompt == 0
    assert steps == [*range(16, 16 + once)] * 2


@pytest.mark.slow
# inside torch's own compiler
@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
@pytest.mark.parametrize("phase", ["prefill", "decode"])
def test_a_pass_is_taken_apart(phase: str) -> None:
    config = load_model(LLAMA)
    w = lower(config, phase=phase, batch=2, seq=16, engine="hf", dtype="fp32")
    device = ReplayDevice(description=Description("cpu", "some CPU"))
    runner, case = (
        HfRunner(device, ModelRun(config, "fp32", "hf", LLAMA)),
        Case(Pruning(()), (), w, w),
    )
    runner.begin(case)
    seen = runner.observe(case, 0.1)
    named = {operator_of(kernel) for kernel, seconds in seen.kernels.items() if seconds > 0.0}
    assert {"gemm", "attention", "elementwise"} <= named
    assert (
        0.0 < sum(s for kernel, s in seen.kernels.items() if operator_of(kernel) == "gemm") < 10.0
    )
    assert seen.version == version("transformers")


def test_a_kernel_of_a_gpu_counts_once() -> None:
    """Torch's profiler lists kernels, the operators that launch them, and annotations of both."""
    copy = "Memcpy DtoD (Device -> Device)"
    linear, product, copying, *kernels = events = [
        FunctionEvent(number, name, 1, start, end, stack=[], use_device="cuda", **more)
        for number, (name, start, end, more) in enumerate(
            [
                ("aten::linear", 0.0, 10.0, {}),
                ("aten::mm", 1.0, 9.0, {}),
                ("aten::copy_", 11.0, 12.0, {}),
                ("nvjet_tst", 20.0, 50.0, ON_GPU),
                ("nvjet_tst", 60.0, 90.0, ON_GPU),
                (copy, 90.0, 92.0, ON_GPU),
                ("forward", 20.0, 92.0, {**ON_GPU, "is_user_annotation": True}),
            ]
        )
    ]
    for operator, kernel in ((product, 0), (product, 1), (copying, 2)):
        launched = kernels[kernel]
        operator.append_kernel(launched.name, 0, launched.time_range.elapsed_us())
    listed = EventList(events, use_device="cuda")
    listed._build_tree()
    assert linear.device_time_total == 60.0
    found = hf.kernel_seconds(listed.key_averages(), on_gpu=True)
    assert found == pytest.approx({"nvjet_tst": 60e-6, copy: 2e-6})


def test_the_head_gets_the_last_position_as_an_array_of_its_own() -> None:
    """Else torch copies the head's weight on a CPU."""
    model, strides = _built(LLAMA, "").model, []
    model.lm_head.register_forward_hook(
        lambda module, inputs, output: strides.append(inputs[0].stride())
    )
    with torch.inference_mode():
        model(torch.zeros((2, 16), dtype=torch.int64), logits_to_keep=1)
    assert strides == [(64, 64, 1)]


@pytest.mark.parametrize("phase", comparing.ENGINES["compile"].phases)
def test_compiled_phases_are_timed_in_turns(phase: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # it has the passes of the others: they need not be compiled again, only captured
    if phase != "generate":
        given = torch.compile
        monkeypatch.setattr(
            torch, "compile", lambda f, mode, **options: given(f, backend="aot_eager", **options)
        )
    (case,) = _cases("compile", load_model(COMPILED), phase=phase, family=["width"])
    runner = _runner(COMPILED, "compile")
    runner.prepare(case)
    record = runner.record(case, 3.0)
    assert record["status"] == "ok", record["reason"]
    assert record["runtime"] == "compiled"
    assert "the prediction has flash attention" in record["reason"]  # a note of the command
    assert min(*record["dense_s"], *record["pruned_s"]) > 0


@pytest.mark.parametrize("counts", [True, False], ids=["from 5.5 on", "before 5.5"])
def test_a_static_cache_is_rewound_in_releases_without_a_crop(
    counts: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import StaticCache
    from transformers.cache_utils import StaticLayer

    monkeypatch.delattr(StaticLayer, "crop", raising=False)
    built = _built(LLAMA, "")
    cache, tokens = StaticCache(config=built.model.config, max_cache_len=20), torch.arange(12)[None]
    with torch.inference_mode():
        built.model(tokens, use_cache=True, **{built.cache_name: cache})
        for layer in cache.layers if not counts else ():
            vars(layer).pop("cumulative_length", None)
        hf._rewind(cache, 8)
    first = cache.layers[0]
    assert (
        int(
            first.cumulative_length
            if hasattr(first, "cumulative_length")
            else first.keys[0, 0].any(-1).sum()
        )
        == 8
    )


def test_what_transformers_cannot_run_is_refused_before_anything_is_made(tmp_path: Path) -> None:
    cases = _cases("hf", family=["depth", "dynamic_depth", "token"], phase="prefill")
    found = comparing.compare(
        tmp_path / "run", _device(), ModelRun(CONFIG, "fp32", "hf", TINY), cases, 3.0
    )
    assert [r["prune"] for r in found.records] == ["depth 0.5"]
    (note,) = found.notes
    assert note.startswith(
        "dynamic_depth 0.5, token 0.5: not executed: it decides during a pass"
    ), note
    header = read_store(tmp_path / "run" / "decoder.hf.jsonl").header
    assert header.stack["transformers"] == version("transformers")


@pytest.mark.parametrize("engine", ["hf", "compile"])
@pytest.mark.parametrize("prune", ["kv_cache 0.5", "token 0.5", "token 0.5 start=0 mode=static"])
def test_a_smaller_cache_and_fewer_tokens_are_refused_because_the_dense_model_would_run(
    engine: str, prune: str
) -> None:
    (case,) = _cases(engine, phase="decode", family=None, sparsity=None, prune=[prune])
    with pytest.raises(InputError, match="would run those of the dense model"):
        _runner(engine=engine).check(case)


def test_the_command_runs_transformers(tmp_path: Path, cli: Any) -> None:
    model, folder = tmp_path / "config.json", tmp_path / "run"
    model.write_text(json.dumps(TINY))
    line = (
        f"compare {model} --device cpu --engine hf --dtype fp32 --seq 16 --new-tokens 4 --hardware"
        f" a100 -o {folder}"
    )
    texts = "--prune 'depth 0.5' --prune 'width mlp=0.5 layers=1-2'"
    out = cli.out(f"{line} {texts} --phase prefill,decode,generate --budget 6s")
    assert "; a verdict needs 10.\nWorst: " in out
    assert out.count("generate") >= 2
    files = {p.name for p in folder.iterdir()}
    assert files == {
        "decoder.hf.jsonl",
        *(f"comparison.hf.{kind}" for kind in ("csv", "md", "png")),
    }
    rows = read_store(folder / "decoder.hf.jsonl").rows
    assert {row["patched"] for row in rows} == {"", "other widths of the MLP in 2 layers"}
    assert {(row["phase"], row["runtime"]) for row in rows} == {
        (p, "eager") for p in comparing.ENGINES["hf"].phases
    }
    assert all(len(row["dense_s"]) == len(row["pruned_s"]) >= 3 for row in rows)
    assert min(second for row in rows for second in (*row["dense_s"], *row["pruned_s"])) > 0


@pytest.fixture
def chosen(tmp_path: Path) -> Path:
    """Folders of a dense model and of a model whose layers differ, and a plan of different
    layers."""
    dense = {**TINY, "num_hidden_layers": 4, "intermediate_size": 512}
    attention, mlp = {"n_heads_in_group": 8}, {"ffn_mult": 4.0}
    none = {"no_op": True}
    configs = [
        (attention, mlp),
        (none, {"ffn_mult": 12.0}),
        ({"n_heads_in_group": 2}, none),
        (none, none),
    ]
    pruned = {k: v for k, v in dense.items() if k != "intermediate_size"} | {
        "model_type": "nemotron-nas",
        "block_configs": [{"attention": a, "ffn": m} for a, m in configs],
    }
    for name, content in (("dense", dense), ("chosen", pruned)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(content))
    plan = (
        "layers:\n  0: width mlp=0.5 kv=0.5\n  1: depth unit=attention\n  2: depth unit=mlp\n  3:"
        " depth\n"
    )
    (tmp_path / "plan.yaml").write_text(plan)
    return tmp_path


@pytest.mark.parametrize("engine", ["reference", "hf"])
def test_the_command_runs_other_choices_in_each_layer(engine: str, chosen: Path, cli: Any) -> None:
    how = (
        f"--device cpu --engine {engine} --dtype fp32 --seq 16 --hardware a100 --phase prefill"
        " --budget 4s"
    )
    models = f"{chosen / 'dense'} --pruned {chosen / 'chosen'} --prune {chosen / 'plan.yaml'}"
    line = f"compare {models} {how} -o {chosen / 'run'}"
    plan, model = cli.json(line)
    assert plan["prune"].startswith("width mlp=0.5 kv=0.5 layers=0 + depth layers=1 unit=attention")
    assert model["prune"].startswith("chosen (")
    assert model["family"] == "depth+width"
    for row in (plan, model):
        assert row["measured"] > 0
        assert row["predicted"] > 1
    config = chosen / "chosen" / "config.json"
    config.write_text(config.read_text().replace("12.0", "6.0"))  # the file is another model now
    _, other = cli.json(line)
    assert other["prune"] != model["prune"]
    records = read_store(next((chosen / "run").glob("decoder*.jsonl"))).rows
    assert len({row["key"] for row in records}) == 3


@pytest.mark.parametrize(
    ("change", "more", "reason"),
    [
        ({"vocab_size": 64}, "", "chosen: vocab: expected 128, as the dense model has, got 64"),
        ({}, "--layers 2", "--layers: expected none with --pruned"),
        ({}, "--sparsity 0.5", "sparsity, option: expected with a family or a method"),
    ],
)
def test_pruned_models_that_cannot_be_compared(
    change: dict[str, int], more: str, reason: str, chosen: Path, cli: Any
) -> None:
    file = chosen / "chosen" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    line = (
        f"compare {chosen / 'dense'} --pruned {chosen / 'chosen'} --device cpu --hardware a100 -o"
        f" {chosen / 'run'}"
    )
    assert reason in cli.refused(f"{line} {more}")
    assert not (chosen / "run").exists()
