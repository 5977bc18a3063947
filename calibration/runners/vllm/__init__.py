"""Time dense and pruned models in vLLM; ``worker`` is the program of a child process.

The interface is Python (``LLM``, ``SamplingParams``, ``LLMEngine``), not the command ``vllm bench``: one start of a
model, a minute on a GPU, serves all its requests, dense and pruned samples alternate, and requests of the steady state
finish at equal distances.
"""
