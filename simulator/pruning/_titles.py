"""Published methods in the order of tables, with their names as the papers write them."""

from __future__ import annotations

from collections.abc import Mapping

TITLES: Mapping[str, str] = {
    # depth
    "shortgpt": "ShortGPT",
    "laco": "LaCo",
    "sleb": "SLEB",
    "shortened-llama": "Shortened LLaMA",
    "minitron-depth": "Minitron (depth)",
    "attention-drop": "Attention Drop",
    "layerskip": "LayerSkip",
    # width
    "llm-pruner": "LLM-Pruner",
    "flap": "FLAP",
    "slicegpt": "SliceGPT",
    "minitron-width": "Minitron (width)",
    "sheared-llama": "Sheared LLaMA",
    # zeros and factors
    "wanda": "Wanda",
    "sparsegpt": "SparseGPT",
    "wanda-2:4": "Wanda 2:4",
    "sparsegpt-2:4": "SparseGPT 2:4",
    "mask-llm": "MaskLLM",
    "svd-llm": "SVD-LLM",
    "asvd": "ASVD",
    # dynamic depth and width
    "skipgpt": "SkipGPT",
    "mod": "Mixture-of-Depths",
    "calm": "CALM",
    "deja-vu": "Deja Vu",
    # attention, tokens and cache
    "seer-attention": "SeerAttention",
    "seer-attention-r": "SeerAttention-R",
    "minference": "MInference",
    "minference-7096": "MInference-7096",
    "quest": "Quest",
    "fastv": "FastV",
    "pyramiddrop": "PyramidDrop",
    "llmlingua": "LLMLingua",
    "snapkv": "SnapKV",
    "h2o": "H2O",
    "snapkv-1024": "SnapKV-1024",
    "snapkv-2048": "SnapKV-2048",
    "snapkv-4096": "SnapKV-4096",
    "streaming-llm": "StreamingLLM",
    # experts
    "reap": "REAP",
    "naee": "NAEE",
    "naee-skip": "NAEE (skipping)",
    "hc-smoe": "HC-SMoE",
    "m-smoe": "M-SMoE",
}


def method_title(name: str) -> str:
    """Return the name of a published method as its paper writes it; other names are unchanged."""
    return TITLES.get(name, name)
