"""A grid that takes a second or two: long enough to be interrupted, killed and gone on with."""

GRID = """
models: [llama-3.2-1b]
hardware: [h100_sxm]
sparsities: {from: 0.02, to: 0.9, step: 0.04}
phases: [prefill, decode, generate]
batches: {from: 1, to: 32, times: 2}
seqs: [128, 512, 2048]
new_tokens: 16
"""
