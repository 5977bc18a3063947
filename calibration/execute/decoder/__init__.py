"""A real decoder in torch, dense or pruned by any family, to be run and timed: what predictions are compared with.

    dense = random_decoder(simulator.load_model("smollm2-135m"), dtype="bf16", place="cpu")
    pruned = prune_decoder(dense, "depth", 0.25)
    logits, state = prefill(pruned, tokens)
    logits = decode(pruned, next_token, state)
    times = time_decoder(pruned, batch=1, seq=512)          # TTFT and TPOT

``model`` holds the weights, ``families`` prunes them or switches a dynamic family on, ``run`` is the forward pass and ``routed`` what is
decided in it, ``timing`` the clock. Needs torch; importing this package imports it.
"""

from __future__ import annotations

from calibration.execute.decoder.families import DYNAMIC, STATIC, prune_decoder
from calibration.execute.decoder.model import Decoder, Dynamic, State, from_weights, random_decoder
from calibration.execute.decoder.run import decode, prefill
from calibration.execute.decoder.timing import time_decoder

__all__ = [
    "DYNAMIC",
    "STATIC",
    "Decoder",
    "Dynamic",
    "State",
    "decode",
    "from_weights",
    "prefill",
    "prune_decoder",
    "random_decoder",
    "time_decoder",
]
