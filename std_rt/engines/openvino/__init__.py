"""OpenVINO: the CPU backend ``openvino``, the default.

Its Python package sends a usage report when it is imported and ``openvino_telemetry`` is installed, which pip
does. std-rt reports nothing to anyone, so it imports OpenVINO with that package hidden.
"""

import sys

_REPORTING = "openvino_telemetry"

if "openvino" not in sys.modules:
    _there = sys.modules.get(_REPORTING)
    sys.modules[_REPORTING] = None  # type: ignore[assignment]  # an import of it fails
    try:
        import openvino  # noqa: F401
    finally:
        if _there is None:
            del sys.modules[_REPORTING]
        else:
            sys.modules[_REPORTING] = _there
