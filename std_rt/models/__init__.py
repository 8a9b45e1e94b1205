"""Torch modules, and readers of weights and IP-Adapters, that training and export share. Importing the package itself loads no torch."""

STYLE_HEADS = 6  # attention heads of the style encoder's resampler
