"""Inference with a memory: read texts of any length, answer prompts, serve."""
