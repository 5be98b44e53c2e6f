"""The command line: options, printing, progress, exit codes.

One file for each group of verbs. Each parses, calls a command and prints its result; torch is
imported only when a command needs it. The only room that prints. Imports every room but numerics;
no room may come in but the package's entry points.
"""
