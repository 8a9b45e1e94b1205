"""Access to NVIDIA GPUs that several backends share: the CUDA driver, its probe, CUDA's libraries."""
