"""Compress Mixture-of-Experts models and export them to one small machine."""
