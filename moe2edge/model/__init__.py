"""A checkpoint as an immutable value, and the table of model families.

Lazy tensor handles, experts, routers, layers, blocks, the whole model; how a family names its
tensors and spells its config; how a model becomes a ``config.json`` again. Nothing here reads a
number: a change is a new value with other handles. Imports numerics; every room above may come in.
"""
