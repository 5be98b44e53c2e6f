"""One file for each thing that a user asks for; nothing here prints.

Export with its preflight, texts, targets and report; decide; generate. Each takes values, raises
the errors that have exit codes, and returns values, so that the command line and the Python API
stand on the same functions. Imports evaluation and below; only the command line and the package
itself may come in.
"""
