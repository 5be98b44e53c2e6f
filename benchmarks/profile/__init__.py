"""Numbers of a profile beside those of other programs."""
