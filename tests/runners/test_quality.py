"""Quality of pruned models: scores by definition, the model's own code, commands."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tables import rows_of

torch = pytest.importorskip("torch", reason="measuring quality needs PyTorch")

import shaped  # noqa: E402
from shaped import model_of  # noqa: E402
from tiny_checkpoint import TEXT, random_llama, write_checkpoint  # noqa: E402

from calibration.runners import quality  # noqa: E402
from calibration.runners.decoder.model import (  # noqa: E402
    Decoder,
    random_decoder,
    window_logits,
)
from calibration.runners.quality import (  # noqa: E402
    decoder_of,
    logits_of,
    score,
)
from simulator.errors import InputError  # noqa: E402
from simulator.prediction.quality import load_quality  # noqa: E402

CONFIG = model_of(*[shaped.layer(4, 2, 128, 16)] * 5, vocab=97, max_positions=512)


@pytest.fixture(scope="module")
def decoder() -> Decoder:
    return random_decoder(CONFIG, dtype="fp32")


def test_scores_by_hand() -> None:
    """Two tokens are predicted in each window: probabilities 1/2 and 1/4 of three tokens become 1/4
    and 1/2."""
    before = torch.tensor([[0.5, 0.25, 0.25]]).log().expand(3, 3)
    after = torch.tensor([[0.25, 0.5, 0.25]]).log().expand(3, 3)
    found = score(
        lambda ids: before, lambda ids: after, [torch.tensor([2, 0, 1]), torch.tensor([2, 0, 0])]
    )
    assert found.dense_perplexity == pytest.approx(
        math.exp(-(3 * math.log(0.5) + math.log(0.25)) / 4)
    )
    assert found.perplexity == pytest.approx(math.exp(-(3 * math.log(0.25) + math.log(0.5)) / 4))
    assert found.kl_nats == pytest.approx(0.25 * math.log(2))
    assert found.sampled_acceptance == pytest.approx(0.75)  # min(1/2, 1/4) + 2 min(1/4, ...)
    assert found.greedy_acceptance == 0.0


def test_acceptance_is_the_share_that_speculative_sampling_accepts() -> None:
    """Tokens of the draft are drawn and accepted with min(1, p_dense / p_pruned), as arXiv
    2211.17192 does."""
    generator = torch.Generator().manual_seed(0)
    dense, draft = torch.randn(2, 3, 20, generator=generator)
    found = score(lambda ids: dense, lambda ids: draft, [torch.tensor([0, 1, 2])])
    p, q = dense[:2].softmax(-1), draft[:2].softmax(-1)
    drawn = q.multinomial(200_000, replacement=True, generator=generator)
    accepted = torch.rand(drawn.shape, generator=generator) < p.gather(1, drawn) / q.gather(
        1, drawn
    )
    # five standard errors
    assert found.sampled_acceptance == pytest.approx(float(accepted.double().mean()), abs=0.004)
    assert 0.1 < found.sampled_acceptance < 0.9


def test_greedy_acceptance_counts_tokens_whose_best_agree() -> None:
    """The last logits of a window predict no token of it and do not count; windows count
    equally."""
    dense, draft = torch.eye(4), torch.eye(4)[[0, 1, 3, 2]]
    found = score(lambda ids: dense, lambda ids: draft, [torch.arange(4), torch.arange(4)])
    assert found.greedy_acceptance == pytest.approx(2 / 3)


@pytest.mark.quick
def test_pass_equals_transformers_own_code() -> None:
    pytest.importorskip("transformers", reason="the comparison needs transformers")
    model = random_llama()
    ours = decoder_of(model, "tiny")
    ids = torch.arange(64) % CONFIG.vocab
    torch.testing.assert_close(
        window_logits(ours, ids), logits_of(model)(ids), rtol=1e-3, atol=1e-3
    )
    with torch.no_grad():
        model.model.rotary_emb.inv_freq.mul_(1.5)
        told = decoder_of(model, "tiny")  # the frequencies are read from the model
        torch.testing.assert_close(
            window_logits(told, ids), logits_of(model)(ids), rtol=1e-3, atol=1e-3
        )
        for layer in model.model.layers:
            layer.input_layernorm.variance_epsilon = 100.0
    with pytest.raises(
        InputError, match="expected a plain Llama-style decoder: its own code gives a loss of"
    ):
        decoder_of(model, "tiny")


def _tokenizer(text: str, **_: object) -> SimpleNamespace:
    return SimpleNamespace(input_ids=[b % CONFIG.vocab for b in text.encode()])


@pytest.fixture
def folders(decoder: Decoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of a model: a random decoder replaces the model that transformers would load."""
    models = {"Tiny-Llama": decoder}

    def loaded(what: str, folder: str | Path, **_: object) -> Any:
        return _tokenizer if what == "AutoTokenizer" else models[Path(folder).name]

    def decoders_logits(model: Decoder) -> quality.Logits:
        return lambda ids: window_logits(model, ids)

    monkeypatch.setattr(quality, "_from_folder", loaded)
    monkeypatch.setattr(quality, "load_model", lambda folder: models[Path(folder).name])
    monkeypatch.setattr(quality, "decoder_of", lambda model, name: model)
    monkeypatch.setattr(quality, "logits_of", decoders_logits)
    (tmp_path / "text.txt").write_text(
        "\n".join(f"line {i} says {i * i}" for i in range(200)), encoding="utf-8"
    )
    return tmp_path


def test_command_scores_families_and_writes_a_table_for_pareto(folders: Path, cli: Any) -> None:
    table, chosen = (
        folders / "q.csv",
        "--family depth,width,low_rank,unstructured,width_cross --sparsity 0.3,0.6",
    )
    where = f"{folders / 'Tiny-Llama'} --text {folders / 'text.txt'} --windows 3 --length 64"
    rows = cli.json(f"quality {where} {chosen} -o {table}")
    assert len(rows) == 10
    for row in rows:
        assert row["model"] == "Tiny-Llama"
        assert row["kl_nats"] > 0.0
        assert row["perplexity"] > 1.0
        assert 0.0 <= row["greedy_acceptance"] <= 1.0
        assert 0.0 < row["sampled_acceptance"] < 1.0
        if row["family"] == "unstructured":
            assert row["realised_sparsity"] == pytest.approx(row["sparsity"], abs=1e-3)
    by = {(r["family"], r["sparsity"]): r["kl_nats"] for r in rows}
    assert all(
        by[family, 0.3] < by[family, 0.6] for family in ("width", "unstructured", "width_cross")
    )
    read = load_quality(table)
    assert read.models == ("tiny-llama",)
    assert [r.pruned for r in read.rows] == [pytest.approx(r["perplexity"]) for r in rows]
    assert f"acceptance as a draft {rows[0]['sampled_acceptance']:.4g} sampled" in read.rows[0].note
    pareto = f"pareto llama-3.2-1b --hardware rtx_4090 --quality {table}"
    assert "tiny-llama" in cli.refused(pareto)
    assert "largest weights" in cli.out(f"{pareto} --quality-model tiny-llama")


@pytest.mark.parametrize(
    ("more", "expected"),
    rows_of("""
--family dynamic_depth                       | family 'dynamic_depth' is unknown
--sparsity 1.5                               | expected a fraction in (0, 1)
--windows 0                                  | expected at least 1 window
--length 4000                                | too short
--text none.txt                              | none.txt: cannot be read
-o no/folder/q.csv                           | no/folder
--pruned x --family width --sparsity 0.2,0.5 | one --family and one --sparsity
"""),
)
def test_command_refuses(more: str, expected: str, folders: Path, cli: Any) -> None:
    where = f"{folders / 'Tiny-Llama'} --text {folders / 'text.txt'} --windows 2 --length 64"
    assert expected in cli.refused(f"quality {where} {more}")


def test_real_folders_from_the_command_line(tmp_path: Path, cli: Any) -> None:
    """A tiny random model, written and read by transformers: pruned here, and as a pruned
    checkpoint."""
    pytest.importorskip("transformers", reason="reading a model needs transformers")
    pytest.importorskip("tokenizers", reason="reading a model needs tokenizers")
    dense = tmp_path / "dense"
    model = write_checkpoint(dense)
    model.model.layers = model.model.layers[:2]
    model.config.num_hidden_layers = 2
    model.save_pretrained(tmp_path / "pruned")
    (tmp_path / "text.txt").write_text(TEXT)
    line = f"quality {dense} --text {tmp_path / 'text.txt'} --windows 2 --length 100"
    for more in (
        "--family width --sparsity 0.2",
        f"--pruned {tmp_path / 'pruned'} --family depth --sparsity 0.33",
    ):
        (row,) = cli.json(f"{line} {more}")
        assert row["kl_nats"] > 0.0
    # the dense model as its own draft
    (row,) = cli.json(f"{line} --pruned {dense} --family depth --sparsity 0.33")
    assert row["sampled_acceptance"] == pytest.approx(1.0, abs=1e-5)
    assert row["greedy_acceptance"] == 1.0
    printed = cli.out(f"{line} --family width --sparsity 0.2").splitlines()
    assert printed[1].split() == ["accepted", "accepted"]
