"""The contracts of passes, targets and recipes, and the running of a recipe.

Kinds of passes and their outcomes, targets, recipes with their JSON Schema, the registry that
finds passes and targets by file name, the plan and its stages, the block-wise solver, files of
decisions. Imports calibration and below; passes and targets stand on it, and so do evaluation,
commands and the command line.
"""
