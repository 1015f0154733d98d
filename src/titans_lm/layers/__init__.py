"""Layers of a network: the neural memory, attention, and what they are made of."""
