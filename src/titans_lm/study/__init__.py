"""Grids of models, tasks and seeds: each cell is trained and tested by itself, and a table is made of all."""
