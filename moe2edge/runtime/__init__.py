"""Everything that makes a model run in PyTorch, and the memory that it takes.

Decoder blocks of transformers fitted to a block of ours, tied and replaced experts, matrices that
stay in 4 bits, `load`, generation, the protocol that every reopened output follows, and limits of
memory. Imports storage and below; every room above may come in.
"""
