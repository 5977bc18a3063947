"""Scores of single layers: equal to those of whole passes, variants that lose nothing, the command and resumed runs."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="measuring quality needs PyTorch")

from decoder_reference import CONFIG as USUAL  # noqa: E402
from tiny_checkpoint import TEXT, write_checkpoint  # noqa: E402

from calibration.runners import quality  # noqa: E402
from calibration.runners.decoder.model import Attention, Decoder, Layer, Mlp, random_decoder, window_logits  # noqa: E402
from calibration.runners.quality import DENSE, changes_of, fewer_heads, measure_layers, score  # noqa: E402
from simulator.cli import run  # noqa: E402
from simulator.models.library import load_model  # noqa: E402
from simulator.plans.library import Library, generated_library, read_library  # noqa: E402
from simulator.plans.variants import variant  # noqa: E402

CONFIG = replace(USUAL, heads=8, kv_heads=4, inner=64, layers=3, windows=(0,) * 3, qkv_bias=True)
SCORED, CALIBRATION = torch.randint(CONFIG.vocab, (2, 2, 20), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def decoder() -> Decoder:
    return random_decoder(CONFIG, dtype="fp32")


def _library(**texts: list[str]) -> Library:
    """A library with some variants of all layers."""
    usual = CONFIG.usual
    blocks = [variant(name, text, usual) for name, some in texts.items() for text in some]
    return Library(CONFIG, ((usual, *blocks),) * CONFIG.layers)


def _measured(decoder: Decoder, **texts: list[str]) -> dict[tuple[str, str, str], float]:
    rows = measure_layers(decoder, list(SCORED), list(CALIBRATION), changes_of(_library(**texts)))
    return {row.key: row.kl_div for row in rows}


def _parts(layer: Layer) -> tuple[Attention, Mlp]:
    assert layer.attention is not None
    assert layer.mlp is not None
    return layer.attention, layer.mlp


def _at(decoder: Decoder, number: int, layer: Layer) -> Decoder:
    return replace(decoder, layers=(*decoder.layers[:number], layer, *decoder.layers[number + 1 :]))


@pytest.mark.quick
@pytest.mark.parametrize("keep", [True, False])
def test_scores_are_those_of_whole_passes(decoder: Decoder, keep: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quality, "MOST_LOGIT_BYTES", 2e9 if keep else 0)
    found = _measured(decoder, attention=["kv=2", "none"], mlp=["none"])
    assert list(found)[:4] == [DENSE, ("0", "kv=2", "dense"), ("0", "none", "dense"), ("0", "dense", "none")]
    assert found[DENSE] == pytest.approx(0.0, abs=1e-6)
    for number, layer in enumerate(decoder.layers):
        attention, _ = _parts(layer)
        for key, changed in (
            (("kv=2", "dense"), replace(layer, attention=fewer_heads(attention, 8, 2, decoder.head_dim))),
            (("none", "dense"), replace(layer, attention=None)),
            (("dense", "none"), replace(layer, mlp=None)),
        ):
            both = (partial(window_logits, one) for one in (decoder, _at(decoder, number, changed)))
            whole = score(*both, SCORED)
            assert found[(str(number), *key)] == pytest.approx(whole.kl_nats, rel=1e-3)
            assert whole.kl_nats > 1e-3


@pytest.mark.quick
def test_channels_that_are_silent_on_the_text_go_first(decoder: Decoder) -> None:
    attention, mlp = _parts(decoder.layers[1])
    gate = mlp.gate.weight.clone()
    gate[::2] = 0.0  # an activation of 0, whatever the output weights
    loud = mlp.down.weight * torch.where(torch.arange(64) % 2 == 0, 10.0, 1.0)
    planted = replace(mlp, gate=replace(mlp.gate, factors=(gate,)), down=replace(mlp.down, factors=(loud,)))
    found = _measured(_at(decoder, 1, Layer(attention, planted)), mlp=["32", "16"])
    assert found["1", "dense", "32"] == pytest.approx(0.0, abs=1e-6)
    assert found["1", "dense", "16"] > 1e-3


@pytest.mark.quick
def test_joined_kv_heads_are_means() -> None:
    """Attention whose neighbouring KV heads are equal loses nothing with half of them; the mean of others is exact."""
    decoder = random_decoder(CONFIG, dtype="fp32")
    attention, mlp = _parts(decoder.layers[0])
    d = decoder.head_dim
    twice = torch.arange(4 * d).view(4, d)[[0, 0, 2, 2]].flatten()
    pairs = replace(attention, k=attention.k.rows(twice), v=attention.v.rows(twice))
    found = _measured(_at(decoder, 0, Layer(pairs, mlp)), attention=["kv=2", "kv=1"])
    assert found["0", "kv=2", "dense"] == pytest.approx(0.0, abs=1e-6)
    assert found["0", "kv=1", "dense"] > 1e-4
    one = fewer_heads(attention, 8, 1, d)
    assert (one.heads, one.kv_heads) == (8, 1)
    torch.testing.assert_close(one.k.weight, attention.k.weight.view(4, d, -1).mean(0))
    torch.testing.assert_close(one.v.bias, attention.v.bias.view(4, d).mean(0))


@pytest.mark.quick
@pytest.mark.parametrize(
    ("text", "silent"),
    [
        ("heads=4", [0, 3, 5, 6]),  # one of each group
        ("heads=4 kv=2", [0, 1, 6, 7]),  # whole groups
        ("heads=6 kv=3", [2, 3]),
    ],
)
def test_query_heads_without_output_go_first(decoder: Decoder, text: str, silent: list[int]) -> None:
    attention, mlp = _parts(decoder.layers[2])
    weight = attention.o.weight.clone().view(CONFIG.hidden, 8, -1)
    weight[:, silent] = 0.0
    planted = replace(attention, o=replace(attention.o, factors=(weight.flatten(1),)))
    found = _measured(_at(decoder, 2, Layer(planted, mlp)), attention=[text])
    assert found["2", text, "dense"] == pytest.approx(0.0, abs=1e-6)


# -- the command -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("transformers", reason="reading a model needs transformers")
    pytest.importorskip("tokenizers", reason="reading a model needs tokenizers")
    path: Path = tmp_path_factory.mktemp("models")
    write_checkpoint(path / "tiny")
    (path / "text.txt").write_text(TEXT)
    (path / "choices.yaml").write_text("attention: [dense, kv=1, none]\nmlp: [64, none]\nlayers: {1: {mlp: [dense]}}\n")
    return path


@pytest.fixture
def command(folder: Path, tmp_path: Path) -> Callable[..., list[str]]:
    """The words of a command that scores the choices of the tiny model, with some more words."""
    words = ["quality", str(folder / "tiny"), "--per-layer", "--choices", str(folder / "choices.yaml")]
    words += ["--text", str(folder / "text.txt"), "--windows", "2", "--length", "60", "-o", str(tmp_path / "s.csv")]
    return lambda *more: [*words, *more]


def test_the_command_writes_a_library(
    command: Callable[..., list[str]], folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(command()) == 0
    out = capsys.readouterr().out
    assert "KL divergence (nats/token) of one changed sublayer; dense perplexity" in out
    assert [line.split()[0] for line in out.splitlines()[-3:]] == ["0", "1", "2"]
    model = load_model(str(folder / "tiny"))
    library = read_library(tmp_path / "s.csv", model)
    assert library.texts(0) == [
        ("dense", "dense"),
        ("kv=1", "dense"),
        ("none", "dense"),
        ("dense", "64"),
        ("dense", "none"),
    ]
    assert library.texts(1) == [("dense", "dense"), ("kv=1", "dense"), ("none", "dense")]
    assert set(library.values) == {"kl_div", "perplexity"}
    for column in library.values["kl_div"]:
        assert column[0] == pytest.approx(0.0, abs=1e-6)
        assert (column[1:] > 1e-6).all()
    assert len({float(column[0]) for column in library.values["perplexity"]}) == 1
    assert run(command("--json")) == 0
    rows = json.loads(capsys.readouterr().out)
    assert len(rows) == 1 + 4 + 2 + 4
    assert len(changes_of(generated_library(model))) > len(rows)  # the default


def test_a_killed_run_is_resumed(
    command: Callable[..., list[str]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert run(command("-o", str(tmp_path / "whole.csv"))) == 0
    scored, passes = quality._Dense.score, list[Any]()

    def counted(self: Any, last: Any) -> Any:
        if len(passes) == 6:
            raise KeyboardInterrupt
        passes.append(last)
        return scored(self, last)

    monkeypatch.setattr(quality._Dense, "score", counted)
    assert run(command()) == 130
    assert len((tmp_path / "s.csv").read_text().splitlines()) == 1 + 6
    passes.clear()
    capsys.readouterr()
    assert run(command()) == 0
    assert "6 rows exist; 5 left" in capsys.readouterr().err
    assert len(passes) == 5
    assert (tmp_path / "s.csv").read_text() == (tmp_path / "whole.csv").read_text()
    passes.clear()
    assert run(command()) == 0  # nothing is left
    assert not passes


@pytest.mark.parametrize(
    ("more", "reason"),
    [
        (["--family", "width"], "--per-layer: expected no --pruned, --family or --sparsity"),
        (["--choices", "none.yaml"], "none.yaml"),
        (["--windows", "30"], "too short; expected at least 3600"),
    ],
)
def test_bad_input_is_one_line(
    command: Callable[..., list[str]], more: list[str], reason: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(command(*more)) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert reason in err
