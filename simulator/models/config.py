"""The shapes of a decoder-only transformer, and what follows from them alone: :class:`ModelConfig`.

Made by :func:`simulator.load_model` from the name of a shipped model or from a Hugging Face ``config.json``.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ModelConfig:
    """The shapes of a decoder-only transformer.

    >>> import simulator
    >>> simulator.load_model("llama-2-7b").parameters
    6738415616
    """

    name: str
    architecture: str  # model_type of the configuration
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    inner: int  # width of the MLP
    vocab: int
    rotary_dim: int  # features of each head that are rotated, 0 for none
    max_positions: int
    windows: tuple[int, ...]  # sliding window of each layer in positions, 0 for full attention
    gated: bool = True  # gate, up, down; else up, down
    tied: bool = False  # the head shares the embedding's weights
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False  # RMS norm of each query and key head
    norm: str = "rms"  # "rms" (a weight), "layer" (a weight and a bias) or "none" (a layer norm without either)
    post_norms: bool = False  # two more norms a layer, on the outputs of attention and MLP
    final_norm: bool = True
    parallel_residual: bool = False  # attention and MLP both read the layer's input
    learned_positions: int = 0  # rows of a learned table of positions
    attention_softcap: bool = False  # inside the attention kernel
    logit_softcap: bool = False

    @property
    def q_width(self) -> int:
        """Output features of the query projection."""
        return self.heads * self.head_dim

    @property
    def kv_width(self) -> int:
        """Output features of the key (and of the value) projection."""
        return self.kv_heads * self.head_dim

    @property
    def norm_parameters(self) -> int:
        """Parameters of one norm over the hidden size."""
        return self.hidden * {"rms": 1, "layer": 2, "none": 0}[self.norm]

    @property
    def layer_parameters(self) -> int:
        """Parameters of one decoder layer."""
        h, q, kv = self.hidden, self.q_width, self.kv_width
        attention = (h + self.qkv_bias) * (q + 2 * kv) + (q + self.o_bias) * h + self.qk_norm * 2 * self.head_dim
        wide = 2 if self.gated else 1
        mlp = (wide + 1) * h * self.inner + self.mlp_bias * (wide * self.inner + h)
        return attention + mlp + (4 if self.post_norms else 2) * self.norm_parameters

    @property
    def parameters(self) -> int:
        """Parameters of the whole model, tied weights counted once (exact)."""
        outside = (self.vocab + self.learned_positions) * self.hidden + self.final_norm * self.norm_parameters
        return self.layers * self.layer_parameters + outside + (0 if self.tied else self.vocab * self.hidden)
