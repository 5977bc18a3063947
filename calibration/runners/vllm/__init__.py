"""Time dense and pruned models in vLLM, where it is installed.

``models`` writes the ``config.json`` of both models and checks that vLLM would build the predicted shapes. ``process``
keeps one model in one child process, ``worker`` is the program of that child and the only user of vLLM's interface.
``runner`` has :class:`~calibration.runners.vllm.runner.VllmRunner`, the executor of cases.

The interface is Python (``LLM``, ``SamplingParams``, ``LLMEngine``), not the command ``vllm bench``: one start of a
model, a minute on a GPU, then serves all its requests; dense and pruned samples alternate; and requests of the steady
state finish at equal distances, which ``vllm bench serve`` cannot arrange. :mod:`calibration.runners.vllm_bench` reads
files of ``vllm bench``. Releases 0.11.0 to 0.33.0 have the interface.
"""
