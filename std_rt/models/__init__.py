"""What training and export share: torch modules, and readers of weights and IP-Adapters.

Importing the package itself loads no torch.
"""

STYLE_HEADS = 6  # attention heads of the style encoder's resampler
