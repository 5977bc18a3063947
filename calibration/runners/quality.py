"""Quality of a pruned language model: its perplexity, and how far its predictions are from the
dense model's.

The distance is a KL divergence, and the acceptance of the pruned model as a draft of the dense one.
Sampled: speculative sampling accepts a drafted token with probability sum(min(p_dense, p_pruned))
over the vocabulary (arXiv 2211.17192). Greedy: both models rank the same token first. Each token is
predicted after the text before it, not after other drafted tokens, so an acceptance does not depend
on the position in a draft.

:func:`measure_quality` scores a Hugging Face model that is pruned by families, without fine-tuning,
or one of its pruned checkpoints.
"""

from __future__ import annotations

import hashlib
import math
import platform
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from calibration.runners.decoder.families import STATIC, prune_decoder
from calibration.runners.decoder.model import (
    Decoder,
    Tensor,
    from_weights,
    window_logits,
)
from simulator.errors import InputError
from simulator.files.read import read_bounded
from simulator.prediction.quality import QualityRow
from simulator.request import Name

# from the tokens (n,) of a window to the logits (n, vocabulary) after each of them
Logits = Callable[[Tensor], Tensor]
# 2:4 needs a GPU, and dynamic families need a trained router or predictor
FAMILIES = tuple(name for name in STATIC if name != "semi_structured")
# relative difference from the loss of the model's own code that shows another architecture
MATCH_TOLERANCE = 2e-3


@dataclass(frozen=True)
class Score:
    dense_perplexity: float
    perplexity: float
    kl_nats: float  # mean over tokens of KL(dense || pruned)
    sampled_acceptance: float  # mean over tokens of sum(min(p_dense, p_pruned)), at temperature 1
    greedy_acceptance: float  # share of tokens that both models rank first
    family: str = ""
    sparsity: float = math.nan
    # removed share of the weights of all projections; NaN for a checkpoint
    realised_sparsity: float = math.nan

    def row(self, model: str, protocol: str, source: str) -> QualityRow:
        return QualityRow(
            method="checkpoint" if math.isnan(self.realised_sparsity) else "largest weights",
            family=self.family,
            model=model,
            sparsity=self.sparsity,
            metric="perplexity",
            higher_is_better=False,
            dense=self.dense_perplexity,
            pruned=self.perplexity,
            protocol=protocol,
            source=source,
            note=f"KL divergence {self.kl_nats:.4g} nats per token; acceptance as a draft "
            f"{self.sampled_acceptance:.4g} sampled, {self.greedy_acceptance:.4g} greedy",
        )


def score(dense: Logits, pruned: Logits, windows: Sequence[Tensor]) -> Score:
    """Score one model against another on windows of tokens; each token after the first of a window
    counts."""
    found = []
    for ids in windows:
        before, after = (F.log_softmax(of(ids)[:-1].float(), -1) for of in (dense, pruned))
        losses = [F.nll_loss(log, ids[1:]) for log in (before, after)]
        divergence = F.kl_div(after, before, log_target=True, reduction="batchmean")
        sampled = torch.minimum(before, after).exp().sum(-1).mean()
        greedy = (before.argmax(-1) == after.argmax(-1)).double().mean()
        found.append([*map(float, (*losses, divergence, sampled, greedy))])
    means = torch.tensor(found, dtype=torch.float64).mean(0)
    return Score(*means[:2].clamp(max=700.0).exp().tolist(), *means[2:].tolist())


def measure_quality(
    model: str | Path,
    windows: Sequence[Tensor],
    cases: Sequence[tuple[str, float]],
    pruned: str | Path | None = None,
) -> Iterator[Score]:
    """Score a model that is pruned in each case of family and fraction, or a pruned checkpoint (one
    case)."""
    for family, sparsity in cases:
        Name(tuple(FAMILIES)).check("family", family)
        if not 0.0 < sparsity < 1.0:
            raise InputError(f"sparsity {sparsity:g}: expected a fraction in (0, 1), such as 0.25")
    own = load_model(model)
    if pruned is not None:
        ((family, sparsity),) = cases
        found = score(logits_of(own), logits_of(load_model(pruned)), windows)
        yield replace(found, family=family, sparsity=sparsity)
        return
    decoder = decoder_of(own, Path(model).name)
    for family, sparsity in cases:
        changed = prune_decoder(decoder, family, sparsity)
        found = score(partial(window_logits, decoder), partial(window_logits, changed), windows)
        gone = 1.0 - _weights(changed) / _weights(decoder)
        yield replace(found, family=family, sparsity=sparsity, realised_sparsity=gone)


def _weights(decoder: Decoder) -> int:
    return sum(
        int(factor.count_nonzero()) for _, _, p in decoder.projections() for factor in p.factors
    )


def load_model(folder: str | Path) -> Any:
    """Return the model of a folder in float32; nothing is downloaded and no code of the folder
    runs."""
    return _from_folder(
        "AutoModelForCausalLM", folder, dtype=torch.float32, use_safetensors=True
    ).eval()


def load_windows(folder: str | Path, text: str, windows: int, length: int) -> list[Tensor]:
    """Return windows of a text as tokens of the model in a folder, evenly spread over it."""
    if windows < 1 or length < 2:
        raise InputError(f"expected at least 1 window of 2 tokens, got {windows} of {length}")
    tokenizer = _from_folder("AutoTokenizer", folder)
    ids = torch.tensor(tokenizer(text, add_special_tokens=False, verbose=False).input_ids)
    room = len(ids) - length
    if room < (windows - 1) * length:
        raise InputError(
            f"text of {len(ids)} tokens: too short; expected at least {windows * length}"
        )
    starts = [room * i // max(windows - 1, 1) for i in range(windows)]
    return [ids[start : start + length] for start in starts]


def _from_folder(what: str, folder: str | Path, **options: Any) -> Any:
    try:
        import transformers
    except ImportError as error:
        raise InputError(f"reading a model needs the package transformers: {error}") from None
    if not Path(folder).is_dir():
        raise InputError(f"{folder}: expected a Hugging Face folder")
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    try:
        return getattr(transformers, what).from_pretrained(
            folder, trust_remote_code=False, local_files_only=True, **options
        )
    except (OSError, ValueError, KeyError, ImportError) as error:
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"{folder}: cannot be read as a causal language model: {reason}") from None


def logits_of(model: Any) -> Logits:
    def logits(ids: Tensor) -> Tensor:
        with torch.no_grad():
            return model(ids[None]).logits[0]

    return logits


def decoder_of(model: Any, name: str) -> Decoder:
    """Return our decoder with the weights of a transformers model; InputError if the model gives
    another loss."""
    try:
        config = model.config
        rotary = model.model.rotary_emb
        decoder = from_weights(
            name,
            model.state_dict(),
            head_dim=getattr(config, "head_dim", None)
            or config.hidden_size // config.num_attention_heads,
            epsilon=config.rms_norm_eps,
            rotary_scale=float(getattr(rotary, "attention_scaling", 1.0)),
            frequencies=rotary.inv_freq.detach().float(),
        )
    except (AttributeError, InputError) as error:
        what = "a Llama-style decoder (RMS norms, rotary positions, gated MLP)"
        raise InputError(f"{name}: expected {what}: {error}") from None
    ids = torch.arange(7, 7 + 64) % len(decoder.embedding)
    theirs, ours = (
        float(F.cross_entropy(logits(ids)[:-1].float(), ids[1:]))
        for logits in (logits_of(model), partial(window_logits, decoder))
    )
    if not abs(ours - theirs) <= MATCH_TOLERANCE * max(theirs, 1.0):
        found = f"its own code gives a loss of {theirs:.4f}, this pass {ours:.4f}"
        raise InputError(f"{name}: expected a plain Llama-style decoder: {found}")
    return decoder


def read_text(path: str | Path | None = None) -> tuple[str, str]:
    """Return a text and its name: a UTF-8 file, or the English ``pydoc_data.topics`` that Python
    ships."""
    if path is None:
        from pydoc_data.topics import topics

        text = "\n\n".join(topics[key] for key in sorted(topics))
        name = f"pydoc topics of Python {platform.python_version()}"
    else:
        try:
            text = read_bounded(path).decode("utf-8")
            name = Path(path).name
        except UnicodeDecodeError as error:
            raise InputError(f"{path}: cannot be read as UTF-8 text: {error}") from None
    return text, f"{name} ({hashlib.sha256(text.encode()).hexdigest()[:8]})"
