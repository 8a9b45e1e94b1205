"""Export: an SDXL-layout diffusers folder (and a LoRA) -> a bundle. Needs ``pip install '.[export]'``."""
