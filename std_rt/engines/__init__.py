"""Engines: the only interface to hardware. See `std_rt.engines.protocol`."""

from std_rt.engines.protocol import Engine, GraphSpec
from std_rt.engines.registry import BackendInfo, backends, choose_backend, open_engine, open_runner

__all__ = [
    "BackendInfo",
    "Engine",
    "GraphSpec",
    "backends",
    "choose_backend",
    "open_engine",
    "open_runner",
]
