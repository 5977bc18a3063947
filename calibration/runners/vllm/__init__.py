"""Time dense and pruned models in vLLM, where it is installed; ``worker`` is the program of a child process.

The interface is Python (``LLM``, ``SamplingParams``, ``LLMEngine``), not the command ``vllm bench``: one start of a
model, a minute on a GPU, then serves all its requests; dense and pruned samples alternate; and requests of the steady
state finish at equal distances, which ``vllm bench serve`` cannot arrange. Releases 0.11.0 to 0.33.0 have it.
"""
