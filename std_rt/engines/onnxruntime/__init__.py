"""ONNX Runtime: the CPU backend ``onnxruntime`` and the GPU backend ``cuda``."""
