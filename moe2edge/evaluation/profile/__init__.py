"""Measure the speed and the memory use of an output in fresh processes.

`moe2edge.evaluation.profile.measure` starts the processes, which run
`moe2edge.evaluation.profile.child`; `moe2edge.evaluation.profile.result` holds the measurements,
`moe2edge.evaluation.profile.table` shows them. This file imports nothing, because every import
would count as time and memory of the process that is measured.
"""
