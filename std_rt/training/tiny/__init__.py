"""std-tiny, the built-in model: its three stages."""
