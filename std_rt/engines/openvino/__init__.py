"""OpenVINO: the CPU backend ``openvino``, the default.

Its Python package tells its makers of every import, over the network and from a thread, where the package
that does so is installed (pip installs it). std-rt tells nobody anything: it is imported as without that.
"""

import sys

_REPORTING = "openvino_telemetry"

if "openvino" not in sys.modules:
    _there = sys.modules.get(_REPORTING)
    sys.modules[_REPORTING] = None  # type: ignore[assignment]  # an import of it fails
    try:
        import openvino as openvino
    finally:
        if _there is None:
            del sys.modules[_REPORTING]
        else:
            sys.modules[_REPORTING] = _there
