"""Configurations: none that keeps more reaches the target, it is reached at every place, and a written one is predicted
as it says by the ordinary path."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace
from pathlib import Path
from statistics import NormalDist

import numpy as np
import pytest

from simulator.cli import run
from simulator.errors import InputError
from simulator.hardware.library import load_hardware
from simulator.models.config import ModelConfig
from simulator.models.library import load_model
from simulator.models.lower import lower
from simulator.prediction.advise import Advised, advise
from simulator.prediction.conclusions import of_advice
from simulator.prediction.configurations import ALIKE, KINDS, Configuration, RequiredSpeedups, Target, configurations_of
from simulator.prediction.operating import probability_of
from simulator.prediction.scenario import Scenario
from simulator.prediction.speedup import speedup

SHAPES = ("layers", "hidden", "heads", "kv_heads", "inner")
FAMILIES = ["depth", "width", "width_cross"]


def shapes(model: ModelConfig, c: Configuration) -> ModelConfig:
    return replace(model, windows=model.windows[: c.layers], **{name: getattr(c, name) for name in SHAPES})


@pytest.fixture(scope="module")
def everywhere() -> Advised:
    """Two GPUs, two engines, two requests."""
    return advise("llama-3.2-3b", ["h100", "a100"], 1.4, ["decode"], [1, 16], engine=["vllm", "hf"], family=FAMILIES)


@pytest.mark.parametrize(
    ("kind", "hardware", "phase", "seq"),
    [
        ("width", "a100", "prefill", 512),
        ("depth+width", "h100", "prefill", 2048),
        ("hidden", "rtx_4090", "decode", 2048),
    ],
)
def test_of_all_aligned_shapes_that_reach_it_keeps_most(kind: str, hardware: str, phase: str, seq: int) -> None:
    model, hw = load_model("llama-3.2-1b"), load_hardware(hardware)
    place = RequiredSpeedups.of(Scenario(model=model, phase=phase, shapes=((1, seq),)), [hw], Target(1.4))
    (found,) = [c for c in configurations_of(model, [place], FAMILIES)[0] if c.configuration == kind]
    values = {
        **{"layers": range(2, 16), "hidden": range(256, 2048, 128)},
        **{"kv_heads": range(1, 8), "inner": range(896, 8192, 128)},
    }
    tried = []
    for chosen in itertools.product(*(values[name] for name in KINDS[kind])):
        new = dict(zip(KINDS[kind], chosen))
        lost = [1.0 - value / getattr(model, name) for name, value in new.items()]
        if min(lost) >= ALIKE * max(lost) - 1e-9:
            heads = {"heads": new["kv_heads"] * 4} if "kv_heads" in new else {}
            tried.append(replace(model, windows=model.windows[: new.get("layers", 16)], **new, **heads))
    reach = place.reached(tried, 0.5)
    assert reach.any()
    assert not reach.all()
    assert found.parameters == max(new.parameters for new, yes in zip(tried, reach) if yes)


def test_every_place_is_reached_and_rows_are_the_ordinary_prediction(everywhere: Advised) -> None:
    model, found = load_model("llama-3.2-3b"), everywhere.configurations
    assert len(found) == 8 * len({c.configuration for c in found}) > 8
    kept = [c.kept for c in found]
    assert kept == sorted(kept, reverse=True)
    for c in found:
        new = shapes(model, c)
        request = {"phase": c.result.phase, "batch": c.result.batch, "seq": c.result.seq, "engine": c.result.engine}
        s = speedup(lower(model, **request), lower(new, **request), load_hardware(c.result.hardware))  # type: ignore[arg-type]
        assert (c.result.speedup, c.result.pruned_s) == pytest.approx((s.speedup, s.pruned_s), rel=1e-9)
        assert (c.result.speedup_lower, c.result.speedup_upper) == pytest.approx((s.lower, s.upper), rel=1e-9)
        assert c.result.speedup >= 1.4
        assert c.probability >= 0.5
        assert (c.parameters, c.kept) == (new.parameters, new.parameters / model.parameters)
        assert c.inner % 128 == c.hidden % 128 == 0
        assert c.heads == 3 * c.kv_heads
    # eager Transformers at batch 1 is held by its host: no width alone reaches it there
    assert {c.configuration for c in found} <= {"depth", "depth+width", "all"}
    assert any("width" in line and "everywhere" in line for line in everywhere.notes)


def test_one_place_fewer_never_keeps_less(everywhere: Advised) -> None:
    alone = advise("llama-3.2-3b", ["h100"], 1.4, ["decode"], [16], engine=["vllm"], family=FAMILIES).configurations
    at_one = {c.configuration: c.kept for c in alone}
    assert len(at_one) > len({c.configuration for c in everywhere.configurations})
    for c in everywhere.configurations:
        assert at_one[c.configuration] >= c.kept


def test_the_probability_is_that_of_the_interval() -> None:
    for level in (0.5, 0.9, 0.99):
        z = NormalDist().inv_cdf(0.5 + level / 2)
        lower, upper = 1.5 * np.exp(-0.1 * z), 1.5 * np.exp(0.2 * z)  # log deviations .1 below and .2 above
        draws = np.random.default_rng(7).normal(size=200_000)
        truth = 1.5 * np.exp(np.where(draws < 0, 0.1, 0.2) * draws)
        for target in (1.2, 1.4, 1.5, 1.7, 2.2):
            probability = probability_of(target, 1.5, float(lower), float(upper), level)
            assert probability == pytest.approx(float((truth >= target).mean()), abs=4e-3)
    assert [probability_of(t, 1.5, 1.5, 1.5) for t in (1.4, 1.5, 1.6)] == [1.0, 1.0, 0.0]


@pytest.mark.parametrize("probability", [0.3, 0.9])
def test_the_confidence_asked_for_is_kept(probability: float) -> None:
    asked = {"family": ["depth", "width"], "engine": ["vllm"]}
    usual = advise("llama-3.2-3b", ["h100"], 1.4, ["decode"], **asked).configurations  # type: ignore[arg-type]
    found = advise("llama-3.2-3b", ["h100"], 1.4, ["decode"], probability=probability, **asked).configurations  # type: ignore[arg-type]
    kept = {c.configuration: c.kept for c in usual}
    assert found
    for c in found:
        assert c.probability >= probability
        assert (c.kept < kept[c.configuration]) == (probability > 0.5)
    with pytest.raises(InputError, match="confidence 1: expected a number between 0 and 1"):
        advise("llama-3.2-3b", ["h100"], 1.4, probability=1.0)


def test_a_time_and_a_throughput_are_targets() -> None:
    latency = advise("llama-3.2-3b", ["a100", "l4"], Target(latency_s=15e-3), ["decode"], [4], family=["depth"])
    tokens = advise("llama-3.2-3b", ["a100", "l4"], Target(tokens_per_s=4 / 15e-3), ["decode"], [4], family=["depth"])
    assert [replace(c, target=0.0) for c in latency.configurations] == [
        replace(c, target=0.0) for c in tokens.configurations
    ]
    a100, l4 = latency.configurations
    assert a100.target < 1.0 < l4.target == pytest.approx(l4.result.dense_s / 15e-3)
    assert l4.result.pruned_s <= 15e-3
    fewer = replace(load_model("llama-3.2-3b"), layers=l4.layers + 1, windows=(0,) * (l4.layers + 1))
    dense = lower(load_model("llama-3.2-3b"), phase="decode", batch=4, seq=2048, engine="vllm")
    more = lower(fewer, phase="decode", batch=4, seq=2048, engine="vllm")
    assert speedup(dense, more, load_hardware("l4")).pruned_s > 15e-3
    assert {a.result.hardware for a in latency.advice} == {"l4"}
    assert latency.dense == ("a100_sxm_80gb in vllm (decode, batch 4, seq 2048)",)
    nothing = advise("llama-3.2-3b", ["a100"], Target(latency_s=1.0), family=["depth"])
    assert not nothing.advice
    assert not nothing.configurations
    assert of_advice(nothing, Target(latency_s=1.0))[-1].startswith("The dense model reaches 1.00 s on a100_sxm_80gb")


def test_several_devices_and_heads_that_cannot_change_alone() -> None:
    found = advise("llama-3.1-70b", ["h100"], 1.4, ["decode"], scenario=Scenario(devices=8), family=FAMILIES)
    assert found.configurations
    for c in found.configurations:
        assert c.heads % 8 == 0
        assert c.inner % (8 * 64) == 0
    for c in advise("opt-13b", ["h100"], 1.4, ["decode"], family=FAMILIES).configurations:
        assert c.hidden == c.heads * 128 == c.kv_heads * 128


def test_families_say_which_dimensions_may_change() -> None:
    for family, kinds in {"depth": {"depth"}, "width_cross": {"hidden"}, "unstructured": set()}.items():
        found = advise("llama-3.1-8b", ["h100"], 1.3, ["decode"], family=[family])
        assert {c.configuration for c in found.configurations} == kinds


def test_written_configurations_are_predicted_as_they_say(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    words = ["advise", "llama-3.2-1b", "--hardware", "h100,a100", "--engine", "vllm,hf", "--target", "1.5"]
    words += ["--phase", "decode", "--batch", "8", "--family", "depth,width,width_cross"]
    assert run([*words, "--json", "--write", "out"]) == 0
    records = json.loads(capsys.readouterr().out)
    families = [r for r in records if "configuration" not in r]
    found = [r for r in records if "configuration" in r]
    assert len(families) == 4 * 3
    assert records == families + found
    dense = load_model("llama-3.2-1b")
    for r in found:
        new = load_model(Path("out") / r["configuration"])
        request = {"phase": r["phase"], "batch": r["batch"], "seq": r["seq"], "engine": r["engine"]}
        s = speedup(lower(dense, **request), lower(new, **request), load_hardware(r["hardware"]))
        assert r["speedup"] == pytest.approx(s.speedup, rel=1e-9)
        assert r["probability"] == pytest.approx(probability_of(1.5, s.speedup, s.lower, s.upper), abs=1e-9)
        assert r["parameters"] == new.parameters
        assert r["config"].items() <= json.loads(Path("out", r["configuration"], "config.json").read_text()).items()
    assert {p.name for p in Path("out").iterdir()} == {r["configuration"] for r in found}

    assert run([*words, "--verbose", "--write", "out"]) == 0  # the same again
    told = capsys.readouterr()
    assert "written: out/{depth,depth+width,all}/config.json" in told.err
    assert "on all 4 devices, engines and requests" in told.out
    Path("out/depth/config.json").write_text("{}")
    assert run([*words[:-1], "depth", "--write", "out"]) == 2
    assert "out/depth/config.json: exists with different content" in capsys.readouterr().err
    assert Path("out/depth/config.json").read_text() == "{}"


def test_the_command_wants_one_target(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["advise", "llama-3.2-1b", "--hardware", "h100"]
    for more in ([], ["--target", "1.5", "--latency", "2ms"]):
        assert run([*words, *more]) == 2
        assert "--target, --latency, --tokens-per-s: expected one of them" in capsys.readouterr().err
    assert run([*words, "--latency", "2"]) == 2
    assert "--latency '2': expected" in capsys.readouterr().err
    assert run([*words, "--phase", "decode", "--latency", "1.8ms", "--family", "depth"]) == 0
    assert "reaches 1.80 ms on h100_sxm in vllm (decode, batch 1, seq 2048) is depth: 12" in capsys.readouterr().out


def test_a_file_keeps_its_other_keys_and_odd_shapes_are_searched(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content = {"model_type": "mistral", "hidden_size": 52, "intermediate_size": 1, "num_hidden_layers": 40}
    content |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 13, "vocab_size": 50000}
    content |= {"rope_theta": 1e6, "torch_dtype": "bfloat16"}
    file = tmp_path / "own.json"
    file.write_text(json.dumps(content))
    words = ["advise", str(file), "--hardware", "h100", "--target", "1.3", "--engine", "hf", "--phase", "decode"]
    assert run([*words, "--write", str(tmp_path / "out")]) == 0
    assert "no configuration" not in capsys.readouterr().err  # nothing but its layers has an aligned value below
    written = json.loads((tmp_path / "out/depth/config.json").read_text())
    assert written.pop("num_hidden_layers") < content.pop("num_hidden_layers")
    assert written == content
