"""OpenVINO: the CPU backend ``openvino``, the default."""
