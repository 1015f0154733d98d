"""Language models: configuration, blocks, model, cache; saved, loaded, shipped."""
