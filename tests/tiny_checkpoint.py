"""A tiny random Llama as a Hugging Face folder, and a text for it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

WORDS = 97
TEXT = " ".join(f"w{i * i % WORDS}" for i in range(1200))


def random_llama(**changes: int) -> Any:
    """A random model of transformers with biases in attention, three layers, four heads and two KV
    heads."""
    import transformers

    shape = {
        "vocab_size": WORDS,
        "hidden_size": 64,
        "intermediate_size": 128,
        "max_position_embeddings": 256,
    }
    layers = {"num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2}
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(**{**shape, **layers, "attention_bias": True, **changes})
    ).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0.0, 0.2)
    return model


def write_checkpoint(folder: Path, **changes: int) -> Any:
    """Write a random model and its tokenizer, which has a token per word, into a folder; return the
    model."""
    import tokenizers
    import transformers

    tokenizer = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({f"w{i}": i for i in range(WORDS)}, unk_token="w0")
    )
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    model = random_llama(**changes)
    model.save_pretrained(folder)
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="w0"
    ).save_pretrained(folder)
    return model
