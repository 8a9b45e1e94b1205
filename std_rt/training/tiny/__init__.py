"""std-tiny, the built-in model: its two stages, autoencoder and stylist."""
