"""A Llama-style decoder in torch, dense or pruned by any family, to run it, time it and compute its losses.

    dense = model.random_decoder(simulator.load_model("smollm2-135m"), dtype="bf16", device="cpu")
    pruned = families.prune_decoder(dense, "depth", 0.25)
    logits, state = run.prefill(pruned, tokens)
    logits = run.decode(pruned, next_token, state)

``model`` holds the weights, ``families`` prunes them, ``run`` is the forward pass. A ``run.Rule`` decides what a pass
skips; ``routed`` and ``widths`` have such rules. ``timing`` times passes. The package needs torch.
"""
