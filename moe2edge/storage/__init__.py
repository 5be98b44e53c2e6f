"""Everything that is on the disk.

Checkpoints of others, safetensors, tokenizer files, output folders with their manifests, and the
work folder with its journal, from which a killed export resumes. Whatever is written gets its name
only when it is whole. Imports model and numerics; every room above may come in.
"""
