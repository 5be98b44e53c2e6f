"""Proofs that an output is what it should be, and measurements of how good it is.

The reference that outputs are compared with, audit and parity, perplexity and KL of a source and
its result, overlaps of decisions, routing statistics with their tables and pictures, and the
profiler. Imports pipeline and below, no pass and no target; commands and the command line may come
in.
"""
