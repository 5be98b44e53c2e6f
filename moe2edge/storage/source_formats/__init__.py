"""Quantized checkpoints of other programs, read as lazy handles on dequantized numbers.

`recognition.find_source_format` chooses the reader by ``quantization_config`` and by the tensors;
each other file is one format, and follows its definition, never a reader of another library.
"""
