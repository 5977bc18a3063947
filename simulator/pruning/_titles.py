"""Names of published methods as their papers write them."""

from __future__ import annotations

from collections.abc import Mapping

TITLES: Mapping[str, str] = {
    "asvd": "ASVD",
    "attention-drop": "Attention Drop",
    "calm": "CALM",
    "deja-vu": "Deja Vu",
    "fastv": "FastV",
    "flap": "FLAP",
    "h2o": "H2O",
    "hc-smoe": "HC-SMoE",
    "laco": "LaCo",
    "layerskip": "LayerSkip",
    "llm-pruner": "LLM-Pruner",
    "llmlingua": "LLMLingua",
    "m-smoe": "M-SMoE",
    "mask-llm": "MaskLLM",
    "minference": "MInference",
    "minference-7096": "MInference-7096",
    "minitron-depth": "Minitron (depth)",
    "minitron-width": "Minitron (width)",
    "mod": "Mixture-of-Depths",
    "naee": "NAEE",
    "naee-skip": "NAEE (skipping)",
    "pyramiddrop": "PyramidDrop",
    "quest": "Quest",
    "reap": "REAP",
    "seer-attention": "SeerAttention",
    "seer-attention-r": "SeerAttention-R",
    "sheared-llama": "Sheared LLaMA",
    "shortened-llama": "Shortened LLaMA",
    "shortgpt": "ShortGPT",
    "skipgpt": "SkipGPT",
    "sleb": "SLEB",
    "slicegpt": "SliceGPT",
    "snapkv": "SnapKV",
    "snapkv-1024": "SnapKV-1024",
    "snapkv-2048": "SnapKV-2048",
    "snapkv-4096": "SnapKV-4096",
    "sparsegpt": "SparseGPT",
    "sparsegpt-2:4": "SparseGPT 2:4",
    "streaming-llm": "StreamingLLM",
    "svd-llm": "SVD-LLM",
    "wanda": "Wanda",
    "wanda-2:4": "Wanda 2:4",
}


def method_title(name: str) -> str:
    """Return the name of a published method as its paper writes it; other names are unchanged."""
    return TITLES.get(name, name)
