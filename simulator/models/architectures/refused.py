"""Model types of Transformers that are not read, and why."""

from __future__ import annotations

from collections.abc import Mapping

_TYPES = {
    "half of an encoder-decoder": (
        "bart bigbird_pegasus blenderbot blenderbot-small marian mbart mvp pegasus plbart "
        "prophetnet trocr"
    ),
    "encoder": (
        "bert bert-generation big_bird camembert data2vec-text electra ernie megatron-bert "
        "reformer rembert roberta roberta-prelayernorm roc_bert roformer xlm xlm-roberta "
        "xlm-roberta-xl xlnet xmod"
    ),
    "byte model": "blt",
    "draft head": "gemma4_assistant gemma4_unified_assistant",
    "images without a language model": "git",
    "recurrent net that no engine serves": "hrm_text rwkv xlstm",
    "cross-attention to images": "mllama",
    "speech without a language model": (
        "moshi moss_transcribe_diarize musicgen musicgen_melody whisper"
    ),
}

REFUSED: Mapping[str, str] = {
    kind: reason for reason, kinds in _TYPES.items() for kind in kinds.split()
}
"""Type -> reason. Transformers 5.24 maps all of them to a causal language model."""
