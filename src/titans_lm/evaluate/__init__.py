"""Experiments of the paper and of its field. `titans evaluate NAME` runs the module of that name."""
