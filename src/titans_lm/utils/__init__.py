"""What knows nothing of models: files, locks, records of runs, a terminal."""
