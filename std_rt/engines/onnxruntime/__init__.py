"""ONNX Runtime: the CPU backend ``onnxruntime`` and the GPU backend ``cuda``.

Its builds for Windows report sessions to Microsoft, through the system, unless told not to. std-rt reports
nothing to anyone.
"""

import onnxruntime

onnxruntime.disable_telemetry_events()
