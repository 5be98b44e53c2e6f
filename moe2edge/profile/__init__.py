"""How fast an output is and how much memory it takes, measured in fresh processes.

`moe2edge.profile.measure` starts them, `moe2edge.profile.child` is what runs in them,
`moe2edge.profile.result` holds what came out, `moe2edge.profile.table` shows it.
Nothing is imported here: every child would pay for it.
"""
