"""Quality of a pruned language model: its perplexity, and how far its predictions are from the
dense model's.

The distance is a KL divergence, and the acceptance of the pruned model as a draft of the dense one.
Sampled: speculative sampling accepts a drafted token with probability sum(min(p_dense, p_pruned))
over the vocabulary (arXiv 2211.17192). Greedy: both models rank the same token first. Each token is
predicted after the text before it, not after other drafted tokens, so an acceptance does not depend
on the position in a draft.

:func:`measure_quality` scores a Hugging Face model that is pruned by families, without fine-tuning,
or one of its pruned checkpoints. :func:`measure_layers` scores variants of single layers, for a
library of variants (:mod:`simulator.plans.library`).
"""

from __future__ import annotations

import hashlib
import math
import platform
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from calibration.devices.operators import gated
from calibration.runners.decoder.families import STATIC, best, prune_decoder
from calibration.runners.decoder.model import (
    Attention,
    Decoder,
    Layer,
    Mlp,
    PassState,
    Projection,
    Tensor,
    embedded,
    from_weights,
    logits_after,
    through_layer,
    window_logits,
)
from simulator.errors import InputError
from simulator.files.csv import csv_text, read_csv
from simulator.files.read import read_bounded
from simulator.files.write import write_whole
from simulator.models.model import Layer as LayerShape
from simulator.models.sublayers import Attention as GroupedAttention
from simulator.models.sublayers import Linear
from simulator.models.sublayers import Mlp as DenseMlp
from simulator.plans.library import Library
from simulator.plans.variants import SUBLAYERS, text_of
from simulator.prediction.quality import QualityRow
from simulator.request import Name

# from the tokens (n,) of a window to the logits (n, vocabulary) after each of them
Logits = Callable[[Tensor], Tensor]
# 2:4 needs a GPU, and dynamic families need a trained router or predictor
FAMILIES = tuple(name for name in STATIC if name != "semi_structured")
# dense logits that stay in memory; larger ones are computed again for each variant
MOST_LOGIT_BYTES = 2_000_000_000
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
    return score_logits((dense(ids), pruned(ids), ids) for ids in windows)


def score_logits(windows: Iterable[tuple[Tensor, Tensor, Tensor]]) -> Score:
    """Score windows of dense logits, pruned logits and tokens."""
    found = []
    for *both, ids in windows:
        before, after = (F.log_softmax(logits[:-1].float(), -1) for logits in both)
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


@dataclass(frozen=True)
class Change:
    layer: int
    sublayer: str  # "attention" or "mlp"
    text: str
    variant: LayerShape

    @property
    def key(self) -> tuple[str, str, str]:
        texts = [self.text if name == self.sublayer else "dense" for name in SUBLAYERS]
        return str(self.layer), texts[0], texts[1]


DENSE = ("all", "dense", "dense")  # key of the row of the dense model


@dataclass(frozen=True)
class LayerScore:
    layer: str
    attention: str
    mlp: str
    kl_div: float  # nats per token
    perplexity: float

    @property
    def key(self) -> tuple[str, str, str]:
        return self.layer, self.attention, self.mlp


def changes_of(library: Library) -> list[Change]:
    found: dict[tuple[int, str, str], Change] = {}
    for layer, (dense, variants) in enumerate(zip(library.model.layers, library.layers)):
        for name in SUBLAYERS:
            for variant in variants:
                text = text_of(name, variant, dense)
                if isinstance(variant.of(name), Linear):
                    raise InputError(
                        f"layer {layer}: {name} linear: needs training; expected sizes or none"
                    )
                if text != "dense":
                    found.setdefault((layer, name, text), Change(layer, name, text, variant))
    if not found:
        raise InputError(f"{library.model.name}: expected variants other than dense, got none")
    return list(found.values())


def measure_layers(
    decoder: Decoder,
    windows: Sequence[Tensor],
    calibration: Sequence[Tensor],
    changes: Iterable[Change],
    done: Collection[tuple[str, str, str]] = (),
) -> Iterator[LayerScore]:
    """Score the dense model (:data:`DENSE`), then each change of one sublayer, layer by layer,
    except keys in ``done``.

    Fewer KV heads are means of joined heads (arXiv 2305.13245), as in Puzzle. A narrower MLP keeps
    the channels with the largest mean output on windows of ``calibration``. Only the layers after a
    change are computed again. All windows are equally long.
    """
    todo: dict[tuple[int, str], list[Change]] = {}
    for change in changes:
        if change.key not in done:
            todo.setdefault((change.layer, change.sublayer), []).append(change)
    if not todo and DENSE in done:
        return
    with torch.no_grad():
        state = PassState(decoder, len(windows[0]))
        dense = _rest(state, 0, embedded(state, torch.stack(list(windows))))
        small = 4 * dense.shape[0] * dense.shape[1] * len(decoder.head) <= MOST_LOGIT_BYTES
        kept = [logits_after(decoder, x) for x in dense] if small else None

        def scored(key: tuple[str, str, str], last: Tensor) -> LayerScore:
            before = kept or (logits_after(decoder, x) for x in dense)
            found = score_logits(zip(before, (logits_after(decoder, x) for x in last), windows))
            return LayerScore(*key, found.kl_nats, found.perplexity)

        if DENSE not in done:
            yield scored(DENSE, dense)
        both = embedded(state, torch.stack([*windows, *calibration]))
        many = len(windows)
        for number, layer in enumerate(decoder.layers):
            if not any(at >= number for at, _ in todo):
                return
            for change in todo.get((number, "attention"), ()):
                a = layer.attention
                kept_heads = change.variant.of("attention")
                if a is not None and isinstance(kept_heads, GroupedAttention):
                    sizes = kept_heads.heads, kept_heads.kv_heads
                    a = fewer_heads(a, *sizes, decoder.head_dim)
                elif kept_heads is None:
                    a = None
                changed = through_layer(state, number, replace(layer, attention=a), both[:many])
                yield scored(change.key, _rest(state, number + 1, changed))
            both = through_layer(state, number, replace(layer, mlp=None), both)
            own = todo.get((number, "mlp"), [])
            importance = _importance(state, layer.mlp, both[many:]) if own else None
            for change in own:
                m = layer.mlp
                kept_mlp = change.variant.of("mlp")
                narrow = None
                if m is not None and isinstance(kept_mlp, DenseMlp):
                    narrow = m.channels(best(importance, kept_mlp.inner))
                changed = through_layer(state, number, Layer(None, narrow), both[:many])
                yield scored(change.key, _rest(state, number + 1, changed))
            both = through_layer(state, number, replace(layer, attention=None), both)


def _rest(state: PassState, first: int, x: Tensor) -> Tensor:
    """Return the residual stream after the last layer, from that before the layer ``first``."""
    for number, layer in enumerate(state.decoder.layers[first:], first):
        x = through_layer(state, number, layer, x)
    return x


def fewer_heads(a: Attention, heads: int, kv_heads: int, head_dim: int) -> Attention:
    """Keep the query heads of the largest output weights, and means of their KV heads. Whole groups
    stay if the group size stays, else equally many heads of each group if possible."""
    ratio = a.heads // a.kv_heads
    size = a.o.weight.float().pow(2).sum(0).view(a.kv_heads, ratio, head_dim).sum(2)
    number = torch.arange(a.heads, device=size.device).view(a.kv_heads, ratio)
    if heads == ratio * kv_heads:
        kept = number[best(size.sum(1), kv_heads)].flatten()
    elif heads % a.kv_heads == 0:
        kept = number.gather(1, best(size, heads // a.kv_heads)).flatten()
    else:
        kept = best(size.flatten(), heads)
    features = (kept[:, None] * head_dim + torch.arange(head_dim, device=kept.device)).flatten()

    def joined(p: Projection) -> Projection:
        # mean over the query heads in each new group, each with its KV head
        def mean(rows: Tensor) -> Tensor:
            by_query = rows.view(a.kv_heads, head_dim, -1)[kept // ratio]
            return (
                by_query.view(kv_heads, -1, *by_query.shape[1:])
                .mean(1)
                .reshape(kv_heads * head_dim, -1)
            )

        return Projection((mean(p.weight),), None if p.bias is None else mean(p.bias).flatten())

    return replace(
        a,
        q=a.q.rows(features),
        k=joined(a.k),
        v=joined(a.v),
        o=a.o.columns(features),
        heads=heads,
        kv_heads=kv_heads,
    )


def _importance(state: PassState, m: Mlp | None, x: Tensor) -> Tensor:
    """Return the mean activation of each channel, times the norm of its output weights."""
    if m is None:
        return None
    h = state.norm(x, m.norm)
    return gated(m.gate(h), m.up(h)).abs().mean((0, 1)) * m.down.weight.norm(dim=0)


def weights_digest(decoder: Decoder) -> str:
    found = hashlib.sha256()
    weights = [decoder.embedding, decoder.head, decoder.final_norm]
    weights += [factor for _, _, p in decoder.projections() for factor in p.factors]
    for weight in weights:
        found.update(weight.detach().contiguous().cpu().numpy().data.cast("B"))
    return found.hexdigest()[:8]


def write_scores(path: str | Path, rows: Sequence[LayerScore], protocol: str, source: str) -> None:
    table = [{**asdict(row), "protocol": protocol, "source": source} for row in rows]
    write_whole(path, csv_text(table).encode())


def read_scores(path: str | Path, protocol: str, source: str) -> list[LayerScore]:
    if not Path(path).exists():
        return []
    names = [*LayerScore.__dataclass_fields__, "protocol", "source"]
    table = read_csv(read_bounded(path), str(path), names)
    out = []
    for place, cells in table.records():
        for name, own in (("protocol", protocol), ("source", source)):
            if cells[name] != own:
                raise InputError(
                    f"{place}: {name}: expected {own!r}, got {cells[name]!r}; choose another file"
                )
        try:
            numbers = float(cells["kl_div"]), float(cells["perplexity"])
        except ValueError:
            raise InputError(
                f"{place}: expected numbers in kl_div and perplexity; choose another file"
            ) from None
        out.append(LayerScore(cells["layer"], cells["attention"], cells["mlp"], *numbers))
    return out
