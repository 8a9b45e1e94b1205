"""Ray: this machine alone, or a cluster that runs already; and how many engines there is room for."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import ray
from ray.data import ActorPoolStrategy, DataContext

from std_rt.core.errors import UsageError, one_line
from std_rt.core.machine import available_memory_gb, describe_machine
from std_rt.engines.registry import GPU_BACKENDS

__all__ = ["Engines", "connect", "connected", "engines_for", "job_context"]

_MOST_CORES = 8  # of an engine: small networks leave more of them waiting
_ENGINE_SHARE = 0.375  # of its cores, as Ray counts: two fit on one machine when another has died
_IO_CPUS = 0.25
_STORE_GB = (0.1, 2.0)  # of pictures between stages, at least and at most
_LOST_BLOCKS = 1000  # more than this, and something is wrong with the cluster


@dataclass(frozen=True)
class Engines:
    """How many engines run at once, and on what: ``gpus`` and ``cores`` of each."""

    count: int
    gpus: int
    cores: int

    def actors(self) -> dict[str, Any]:
        """Arguments of `Dataset.map_batches` for a stage of engines."""
        return {
            "compute": ActorPoolStrategy(size=self.count),
            "num_cpus": _IO_CPUS if self.gpus else max(_IO_CPUS, self.cores * _ENGINE_SHARE),
            "num_gpus": self.gpus or None,
        }

    def tasks(self) -> dict[str, Any]:
        """Arguments of `Dataset.map_batches` for a stage that reads or writes.

        Ray would try a task without end whose file kills its process each time.
        """
        if self.gpus:  # a GPU waits for many readers: a photo of 12 megapixels takes a core 0.4 s
            return {"num_cpus": 1, "max_retries": 1}
        return {"num_cpus": _IO_CPUS, "max_retries": 1, "concurrency": self.count * max(2, self.cores)}


@contextmanager
def connected(address: str | None = None) -> Iterator[None]:
    """`connect` for the time of the block; Ray that runs in this process already stays."""
    ours = connect(address)
    try:
        yield
    finally:
        if ours:
            ray.shutdown()


def connect(address: str | None = None) -> bool:
    """Ray: the cluster at ``address``, or this machine alone. False if this process uses one already.

    Raises UsageError if nothing answers there.
    """
    if ray.is_initialized():
        return False
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")  # it writes to stderr
    os.environ.setdefault("RAY_raylet_start_wait_time_s", "300")  # 30 are not enough on a busy machine
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    if address is None:
        low, high = _STORE_GB
        room_gb = min(high, max(low, (available_memory_gb() or high) / 4))
        quiet |= {
            "num_cpus": describe_machine().cores,
            "include_dashboard": False,
            "object_store_memory": int(room_gb * 2**30),
        }
    try:
        with _quiet_stderr():
            ray.init(address=address or "local", **quiet)
    except Exception as error:
        why = one_line(error, 100)
        if address is None:
            raise UsageError(
                f"Ray did not start on this machine ({why}); try again when it is less busy"
            ) from error
        raise UsageError(
            f"no Ray cluster answers at {address} ({why}); start one with ray start --head, "
            "or leave out --address"
        ) from error
    return True


def engines_for(backend: str, cores: int) -> Engines:
    """Engines for the connected cluster: one for each GPU, or one for every ``cores`` (0: see `Engines`)."""
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    gpus = int(sum(node.get("GPU", 0) for node in nodes))
    if gpus and (backend == "auto" or backend in GPU_BACKENDS):
        return Engines(gpus, 1, 0)
    cpus = [int(node["CPU"]) for node in nodes if node.get("CPU", 0) >= 1] or [1]
    each = cores or min(*cpus, _MOST_CORES)
    return Engines(max(1, sum(count // each for count in cpus)), 0, each)


@contextmanager
def job_context() -> Iterator[None]:
    """Ray Data's settings for a job: nothing printed, a block in is a block out, lost ones are passed."""
    settings = {
        "enable_progress_bars": False,
        "print_on_execution_start": False,
        "target_max_block_size": None,
        "max_errored_blocks": _LOST_BLOCKS,
    }
    context, logger = DataContext.get_current(), logging.getLogger("ray.data")
    before, level = {name: getattr(context, name) for name in settings}, logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        for name, value in settings.items():
            setattr(context, name, value)
        with warnings.catch_warnings():  # few blocks, as in a small job or a last pass, are no fault
            warnings.filterwarnings("ignore", "The (maximum|minimum) number of concurrent")
            yield
    finally:
        for name, value in before.items():
            setattr(context, name, value)
        logger.setLevel(level)


@contextmanager
def _quiet_stderr() -> Iterator[None]:
    """Ray's C++ part writes there as it starts, past Python, and cannot be told not to."""
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)
