"""Training: its configuration, its data, and the run, on transformers' `Trainer`."""
