"""Transformers run for real on a tiny model: phases, eager and compiled, and the command that compares."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
if find_spec("transformers") is None:  # not imported, which takes time
    pytest.skip("transformers is not installed; it comes with the extra transformers", allow_module_level=True)

from calibration.devices.protocol import Description  # noqa: E402
from calibration.devices.replay import ReplayDevice  # noqa: E402
from calibration.records.store import read_store  # noqa: E402
from calibration.runners import compare as comparing  # noqa: E402
from calibration.runners import hf  # noqa: E402
from calibration.runners.cases import Case, settings_of  # noqa: E402
from calibration.runners.hf import HfRunner  # noqa: E402
from simulator.cli import run  # noqa: E402
from simulator.models.config import ModelConfig  # noqa: E402
from simulator.models.library import load_model  # noqa: E402
from simulator.prediction.scenario import Scenario  # noqa: E402

TINY = {
    "model_type": "llama",
    "num_hidden_layers": 6,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "vocab_size": 128,
    "max_position_embeddings": 512,
    "tie_word_embeddings": True,
}
CONFIG = load_model(TINY)
COMPILED = {**TINY, "num_hidden_layers": 1}
"""A compiler takes seconds for each kernel."""


def _cases(engine: str, config: ModelConfig = CONFIG, **settings: Any) -> list[Case]:
    runs = comparing.ENGINES[engine]
    scenario = Scenario(engine=runs.lowered, dtype="fp32", new_tokens=4)
    usual = {"seq": [16], "sparsities": [0.5], "families": ["depth"], "known_phases": runs.phases}
    return settings_of(config, **{**usual, "scenario": scenario, **settings})[0]


def _device() -> ReplayDevice:
    return ReplayDevice(description=Description("cpu", "some CPU", {"threads": "1"}))


def _runner(content: dict[str, Any] = TINY, compiled: bool = False) -> HfRunner:
    return HfRunner(_device(), load_model(content), content, "fp32", compiled=compiled, seed=0)


@pytest.mark.parametrize("phase", comparing.ENGINES["hf"].phases)
def test_eager_phases_are_timed_in_turns(phase: str) -> None:
    (case,) = _cases("hf", phases=[phase], batch=[2])
    runner = _runner()
    runner.prepare(case)
    record = runner.record(case, 3.0)
    assert record["status"] == "ok", record["reason"]
    assert (record["runtime"], record["patched"]) == ("eager", "")
    dense, pruned = record["dense_s"], record["pruned_s"]
    assert len(dense) == len(pruned) >= 3
    assert min(*dense, *pruned) > 0


def test_decode_counts_the_steps_between_tokens_and_leaves_the_cache_as_it_was() -> None:
    lengths: list[int] = []
    (case,) = _cases("hf", phases=["decode"])
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
@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")  # inside torch's own compiler
@pytest.mark.parametrize("phase", comparing.ENGINES["compile"].phases)
def test_compiled_phases_are_timed_in_turns(phase: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if phase != "generate":  # it has the passes of the others: they need not be compiled again, only captured
        given = torch.compile
        monkeypatch.setattr(torch, "compile", lambda f, mode, **options: given(f, backend="aot_eager", **options))
    (case,) = _cases("compile", load_model(COMPILED), phases=[phase], families=["width"])
    runner = _runner(COMPILED, compiled=True)
    runner.prepare(case)
    record = runner.record(case, 3.0)
    assert record["status"] == "ok", record["reason"]
    assert record["runtime"] == "compiled"
    assert min(*record["dense_s"], *record["pruned_s"]) > 0


def test_what_transformers_cannot_run_is_refused_before_anything_is_made(tmp_path: Path) -> None:
    cases = _cases("hf", families=["depth", "dynamic_depth", "token"], phases=["prefill"])
    found = comparing.compare(
        tmp_path / "run", _device(), CONFIG, cases, budget_s=3.0, dtype="fp32", engine="hf", content=TINY
    )
    assert [r["prune"] for r in found.records] == ["depth 0.5"]
    (note,) = found.notes
    assert note.startswith("dynamic_depth 0.5, token 0.5: not executed: it decides during a pass"), note
    header = read_store(tmp_path / "run" / "decoder.hf.jsonl").header
    assert header.stack["transformers"] == comparing.versions("hf")["transformers"]


def test_the_command_runs_transformers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, folder = tmp_path / "config.json", tmp_path / "run"
    model.write_text(json.dumps(TINY))
    words = f"compare {model} --device cpu --engine hf --dtype fp32 --seq 16 --new-tokens 4 --hardware a100 -o {folder}"
    texts = ["--prune", "depth 0.5", "--prune", "width mlp=0.5 layers=1-2"]
    assert run([*words.split(), *texts, "--phase", "prefill,decode,generate", "--budget", "6s"]) == 0
    out, _ = capsys.readouterr()
    assert out.startswith("The predictions of a100_sxm_80gb for ")
    assert out.count("generate") >= 2
    files = {p.name for p in folder.iterdir()}
    assert files == {"decoder.hf.jsonl", *(f"comparison.hf.{kind}" for kind in ("csv", "md", "png"))}
    rows = read_store(folder / "decoder.hf.jsonl").rows
    assert {row["patched"] for row in rows} == {"", "other widths of the MLP in 2 layers"}


@pytest.fixture
def chosen(tmp_path: Path) -> Path:
    """Folders of a dense model, and of a model with another choice for each of its layers; a plan of other layers."""
    dense = {**TINY, "num_hidden_layers": 4, "intermediate_size": 512}
    attention, mlp = {"n_heads_in_group": 8}, {"ffn_mult": 4.0}
    none = {"no_op": True}
    configs = [(attention, mlp), (none, {"ffn_mult": 12.0}), ({"n_heads_in_group": 2}, none), (none, none)]
    pruned = {k: v for k, v in dense.items() if k != "intermediate_size"} | {
        "model_type": "nemotron-nas",
        "block_configs": [{"attention": a, "ffn": m} for a, m in configs],
    }
    for name, content in (("dense", dense), ("chosen", pruned)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(content))
    plan = "layers:\n  0: width mlp=0.5 kv=0.5\n  1: depth unit=attention\n  2: depth unit=mlp\n  3: depth\n"
    (tmp_path / "plan.yaml").write_text(plan)
    return tmp_path


@pytest.mark.parametrize("engine", ["reference", "hf"])
def test_the_command_runs_other_choices_in_each_layer(
    engine: str, chosen: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = f"compare {chosen / 'dense'} --device cpu --engine {engine} --dtype fp32 --seq 16 --hardware a100".split()
    words += ["--pruned", str(chosen / "chosen"), "--prune", str(chosen / "plan.yaml"), "--budget", "4s"]
    words += ["--phase", "prefill", "-o", str(chosen / "run")]
    assert run([*words, "--json"]) == 0
    plan, model = json.loads(capsys.readouterr().out)
    assert plan["prune"].startswith("width mlp=0.5 kv=0.5 layers=0 + depth layers=1 unit=attention")
    assert model["prune"].startswith("chosen (")
    assert model["family"] == "depth+width"
    for row in (plan, model):
        assert row["measured"] > 0
        assert row["predicted"] > 1
    config = chosen / "chosen" / "config.json"
    config.write_text(config.read_text().replace("12.0", "6.0"))  # the file is another model now
    assert run([*words, "--json"]) == 0
    _, other = json.loads(capsys.readouterr().out)
    assert other["prune"] != model["prune"]
    assert len(read_store(next((chosen / "run").glob("decoder*.jsonl"))).rows) == 3


@pytest.mark.parametrize(
    ("change", "more", "reason"),
    [
        ({"vocab_size": 64}, "", "chosen: vocab: expected 128, as the dense model has, got 64"),
        ({}, "--layers 2", "--layers: expected none with --pruned"),
        ({}, "--sparsity 0.5", "pruned: a model sets its own pruning"),
    ],
)
def test_pruned_models_that_cannot_be_compared(
    change: dict[str, int], more: str, reason: str, chosen: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = chosen / "chosen" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    words = f"compare {chosen / 'dense'} --pruned {chosen / 'chosen'} --device cpu --hardware a100 -o {chosen / 'run'}"
    assert run([*words.split(), *more.split()]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert reason in line
    assert not (chosen / "run").exists()
