"""Long-horizon forecasting by the standard protocol: series, windows, rivals, training, measures."""
