"""A real Llama-style decoder in torch, dense or pruned by any family, to be run, timed, and judged by its losses.

    dense = model.random_decoder(simulator.load_model("smollm2-135m"), dtype="bf16", place="cpu")
    pruned = families.prune_decoder(dense, "depth", 0.25)
    logits, state = run.prefill(pruned, tokens)
    logits = run.decode(pruned, next_token, state)

``model`` holds the weights, ``families`` changes them, ``run`` is the one forward pass, whose decisions a ``run.Rule``
takes: ``routed`` and ``widths`` have those that save work. ``timing`` is the clock. Needs torch.
"""
