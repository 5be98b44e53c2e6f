"""Pure functions on tensors, and the small values that they take and return.

Rounding, error feedback (GPTQ, SparseGPT), AWQ scales, saliency, losses of subsets of experts,
grouping and merging, low ranks, router fits, packing of integers. Nothing here opens a file, reads
a config or logs. This room imports torch, numpy and scipy, and nothing of ours but the ground
(errors, options, progress); every other room but the command line may come in.
"""
