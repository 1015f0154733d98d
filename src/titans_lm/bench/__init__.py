"""Measurements of time and memory. `titans bench NAME` runs the module of that name."""
