"""The CUDA driver and libraries, for the backends that run on an NVIDIA GPU."""
