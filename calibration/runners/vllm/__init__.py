"""Time dense and pruned models in vLLM; ``worker`` is the program of a child process."""
