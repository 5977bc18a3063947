"""Quality of pruned models: scores against their definition, the model's own code, the command on a tiny model."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="measuring quality needs PyTorch")

import decoder_reference  # noqa: E402
from tiny_checkpoint import TEXT, random_llama, write_checkpoint  # noqa: E402

from calibration.runners import quality  # noqa: E402
from calibration.runners.decoder.families import prune_decoder  # noqa: E402
from calibration.runners.decoder.model import Decoder, random_decoder, window_logits  # noqa: E402
from calibration.runners.quality import decoder_of, logits_of, score  # noqa: E402
from simulator.cli import run  # noqa: E402
from simulator.errors import InputError  # noqa: E402
from simulator.prediction.quality import load_quality  # noqa: E402

CONFIG = replace(
    decoder_reference.CONFIG,
    hidden=64,
    inner=128,
    heads=4,
    kv_heads=2,
    head_dim=16,
    rotary_dim=16,
    vocab=97,
    layers=5,
    windows=(0,) * 5,
)


@pytest.fixture(scope="module")
def decoder() -> Decoder:
    return random_decoder(CONFIG, dtype="fp32")


def test_scores_by_hand() -> None:
    """Two tokens are predicted in each window: probabilities 1/2 and 1/4 of three tokens become 1/4 and 1/2."""
    before = torch.tensor([[0.5, 0.25, 0.25]]).log().expand(3, 3)
    after = torch.tensor([[0.25, 0.5, 0.25]]).log().expand(3, 3)
    found = score(lambda ids: before, lambda ids: after, [torch.tensor([2, 0, 1]), torch.tensor([2, 0, 0])])
    assert found.dense_perplexity == pytest.approx(math.exp(-(3 * math.log(0.5) + math.log(0.25)) / 4))
    assert found.perplexity == pytest.approx(math.exp(-(3 * math.log(0.25) + math.log(0.5)) / 4))
    assert found.kl_nats == pytest.approx(0.25 * math.log(2))


def test_a_layer_that_does_nothing_scores_as_dense(decoder: Decoder) -> None:
    """Scores of single layers, as a search over layers needs them."""
    idle = decoder.layers[2]
    assert idle.attention is not None
    assert idle.mlp is not None
    silent = [replace(p, factors=(p.weight * 0.0,)) for p in (idle.attention.o, idle.mlp.down)]
    layer = replace(idle, attention=replace(idle.attention, o=silent[0]), mlp=replace(idle.mlp, down=silent[1]))
    planted = replace(decoder, layers=(*decoder.layers[:2], layer, *decoder.layers[3:]))
    windows = [torch.arange(80) % CONFIG.vocab]

    def without(number: int) -> quality.Score:
        kept = replace(planted, layers=(*planted.layers[:number], *planted.layers[number + 1 :]))
        return score(lambda ids: window_logits(planted, ids), lambda ids: window_logits(kept, ids), windows)

    assert without(2).kl_nats == pytest.approx(0.0, abs=1e-6)
    assert all(without(number).kl_nats > 0.01 for number in (0, 1, 3, 4))


@pytest.mark.quick
def test_pass_equals_transformers_own_code() -> None:
    pytest.importorskip("transformers", reason="the comparison needs transformers")
    model = random_llama()
    ours = decoder_of(model, "tiny")
    ids = torch.arange(64) % CONFIG.vocab
    torch.testing.assert_close(window_logits(ours, ids), logits_of(model)(ids), rtol=1e-3, atol=1e-3)
    with torch.no_grad():
        model.model.rotary_emb.inv_freq.mul_(1.5)
        told = decoder_of(model, "tiny")  # the frequencies are read from the model
        torch.testing.assert_close(window_logits(told, ids), logits_of(model)(ids), rtol=1e-3, atol=1e-3)
        for layer in model.model.layers:
            layer.input_layernorm.variance_epsilon = 100.0
    with pytest.raises(InputError, match="expected a plain Llama-style decoder: its own code gives a loss of"):
        decoder_of(model, "tiny")


def _tokenizer(text: str, **_: object) -> SimpleNamespace:
    return SimpleNamespace(input_ids=[b % CONFIG.vocab for b in text.encode()])


@pytest.fixture
def folders(decoder: Decoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Folders of a dense and a pruned model: random decoders in place of what transformers would load from them."""
    models = {"Tiny-Llama": decoder, "pruned": prune_decoder(decoder, "width", 0.5)}

    def loaded(what: str, folder: str | Path, **_: object) -> Any:
        return _tokenizer if what == "AutoTokenizer" else models[Path(folder).name]

    def decoders_logits(model: Decoder) -> quality.Logits:
        return lambda ids: window_logits(model, ids)

    monkeypatch.setattr(quality, "_from_folder", loaded)
    monkeypatch.setattr(quality, "load_model", lambda folder: models[Path(folder).name])
    monkeypatch.setattr(quality, "decoder_of", lambda model, name: model)
    monkeypatch.setattr(quality, "logits_of", decoders_logits)
    (tmp_path / "text.txt").write_text("\n".join(f"line {i} says {i * i}" for i in range(200)), encoding="utf-8")
    return tmp_path


def test_command_scores_families_and_writes_a_table_for_pareto(
    folders: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    where = [str(folders / "Tiny-Llama"), "--text", str(folders / "text.txt"), "--windows", "3", "--length", "64"]
    chosen = ["--family", "depth,width,low_rank,unstructured,width_cross", "--sparsity", "0.3,0.6"]
    table = folders / "q.csv"
    assert run(["quality", *where, *chosen, "-o", str(table), "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert len(rows) == 10
    for row in rows:
        assert row["model"] == "Tiny-Llama"
        assert row["kl_nats"] > 0.0
        assert row["perplexity"] > 1.0
        if row["family"] == "unstructured":
            assert row["realised_sparsity"] == pytest.approx(row["sparsity"], abs=1e-3)
    by = {(r["family"], r["sparsity"]): r["kl_nats"] for r in rows}
    assert all(by[family, 0.3] < by[family, 0.6] for family in ("width", "unstructured", "width_cross"))
    read = load_quality(table)
    assert read.models == ("tiny-llama",)
    assert [r.pruned for r in read.rows] == [pytest.approx(r["perplexity"]) for r in rows]
    assert run(["pareto", "llama-3.2-1b", "--hardware", "rtx_4090", "--quality", str(table)]) == 2
    capsys.readouterr()
    of = ["--quality", str(table), "--quality-model", "tiny-llama"]
    assert run(["pareto", "llama-3.2-1b", "--hardware", "rtx_4090", *of]) == 0
    assert "largest weights" in capsys.readouterr().out


def test_command_scores_a_checkpoint(folders: Path, capsys: pytest.CaptureFixture[str]) -> None:
    where = [str(folders / "Tiny-Llama"), "--text", str(folders / "text.txt"), "--windows", "2", "--length", "64"]
    named = ["--pruned", str(folders / "pruned"), "--family", "width"]
    assert run(["quality", *where, "--family", "width", "--sparsity", "0.5", "--json"]) == 0
    (own,) = json.loads(capsys.readouterr().out)
    assert run(["quality", *where, *named, "--sparsity", "0.5", "--json"]) == 0
    (read,) = json.loads(capsys.readouterr().out)
    assert read["kl_nats"] == pytest.approx(own["kl_nats"])
    assert read["realised_sparsity"] is None
    assert run(["quality", *where, *named, "--sparsity", "0.2,0.5"]) == 2
    assert "one --family and one --sparsity" in capsys.readouterr().err
    assert run(["quality", *where]) == 0
    assert "Tiny-Llama: dense perplexity" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        (["--family", "dynamic_depth"], "family 'dynamic_depth' is unknown"),
        (["--sparsity", "1.5"], "expected a fraction in (0, 1)"),
        (["--windows", "0"], "expected at least 1 window"),
        (["--length", "4000"], "too short"),
        (["--text", "none.txt"], "none.txt: cannot be read"),
        (["-o", "no/folder/q.csv"], "no/folder"),
    ],
)
def test_command_refuses(more: list[str], expected: str, folders: Path, capsys: pytest.CaptureFixture[str]) -> None:
    where = [str(folders / "Tiny-Llama"), "--text", str(folders / "text.txt"), "--windows", "2", "--length", "64"]
    assert run(["quality", *where, *more]) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert expected in err


def test_real_folders_from_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A tiny random model and its tokenizer, written and read by transformers: pruned here and as a checkpoint."""
    pytest.importorskip("transformers", reason="reading a model needs transformers")
    pytest.importorskip("tokenizers", reason="reading a model needs tokenizers")
    dense = tmp_path / "dense"
    model = write_checkpoint(dense)
    model.model.layers = model.model.layers[:2]
    model.config.num_hidden_layers = 2
    model.save_pretrained(tmp_path / "pruned")
    (tmp_path / "text.txt").write_text(TEXT)
    size = ["--text", str(tmp_path / "text.txt"), "--windows", "2", "--length", "100", "--json"]
    assert run(["quality", str(dense), *size, "--family", "width", "--sparsity", "0.2"]) == 0
    assert run(["quality", str(dense), *size, "--pruned", str(tmp_path / "pruned"), "--family", "depth",
                "--sparsity", "0.33"]) == 0  # fmt: skip
    assert capsys.readouterr().out.count('"kl_nats": ') == 2
