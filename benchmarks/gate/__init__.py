"""Simulate the gate on timings: how often it is wrong, and what it finds."""
