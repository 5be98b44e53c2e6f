"""What a pass, a target and a recipe are, and how a recipe is run.

The contracts of passes and targets, recipes with their JSON Schema, the registry that finds passes
and targets by file name, the plan and its stages, the block-wise solver, files of decisions.
Imports calibration and below; passes and targets stand on it, and so do evaluation, commands and
the command line.
"""
