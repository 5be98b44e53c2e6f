"""How fast an output is and how much memory it takes, measured in fresh processes.

`moe2edge.evaluation.profile.measure` starts them, `moe2edge.evaluation.profile.child` is what runs in them,
`moe2edge.evaluation.profile.result` holds what came out, `moe2edge.evaluation.profile.table` shows it.
Nothing is imported here: every child would pay for it.
"""
