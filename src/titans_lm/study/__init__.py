"""Grids of models, tasks and seeds: train and test each cell, and tabulate all."""
