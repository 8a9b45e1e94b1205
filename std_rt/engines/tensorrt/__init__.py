"""TensorRT and TensorRT-RTX: the GPU backends ``tensorrt`` and ``rtx``."""
