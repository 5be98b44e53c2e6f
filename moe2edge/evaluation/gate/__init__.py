"""The gate: what may change from one measurement to another, and by how much."""
