"""A Llama-style decoder in torch, dense or pruned by any family, to run it, time it and compute its
losses."""
