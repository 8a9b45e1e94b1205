"""Sources of weights: folders, single files, the hub."""
