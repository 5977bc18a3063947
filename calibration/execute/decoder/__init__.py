"""A real Llama-style decoder in torch, dense or pruned by any family, to be run, timed, and judged by its losses.

    dense = random_decoder(simulator.load_model("smollm2-135m"), dtype="bf16", place="cpu")
    pruned = prune_decoder(dense, "depth", 0.25)
    logits, state = prefill(pruned, tokens)
    logits = decode(pruned, next_token, state)

``model`` holds the weights, ``families`` changes them, ``run`` is the one forward pass, whose decisions a :class:`Rule`
takes: ``routed`` and ``widths`` have those that save work. ``timing`` is the clock. Needs torch; importing this package
imports it.
"""

from __future__ import annotations

from calibration.execute.decoder.families import DYNAMIC, STATIC, prune_decoder
from calibration.execute.decoder.model import Decoder, from_weights, random_decoder
from calibration.execute.decoder.run import Rule, State, decode, prefill, token_losses
from calibration.execute.decoder.timing import time_pair

__all__ = [
    "DYNAMIC",
    "STATIC",
    "Decoder",
    "Rule",
    "State",
    "decode",
    "from_weights",
    "prefill",
    "prune_decoder",
    "random_decoder",
    "time_pair",
    "token_losses",
]
