"""Slow studies that are run by hand, each with the results that are committed beside it.

Every folder has a README or scripts whose docstrings say how they are run. The three large studies
(`trimming`, `slimming`, `replacing`) share the files with an underscore in this folder, and are run
as modules from the root of the checkout::

    python -m benchmarks.trimming.run --models DIR --data DIR

Install with ``pip install -c constraints.txt -e '.[cpu,test,dev]'`` first.
"""
