"""The profiler: latency and memory of a model, measured in fresh processes.

A parent cuts prompts and asks children, each of which loads the model, runs it and reports times
and memory by phase; then come the statistics, the JSON document and the table. The children are
started from `child`. Imports like the rest of evaluation; commands and the command line may come
in.
"""
