"""What all tests share: threads and garbage, a cache of their own, a bundle made by hand, and `std-rt`."""

from __future__ import annotations

import gc
import os
import signal
import sys
from pathlib import Path

import hypothesis
import pytest
from support.cli_support import Cli, Result
from support.handmade import write_handmade

from std_rt.core.bundle import Bundle

# One thread for torch, here and in the processes that tests start. Networks of tests are so small that two
# threads gain nothing, and where something else runs too (another worker, say) each spends its time waiting
# for the other: eight times the processor time, measured on training runs. Read when torch is first imported.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# As in an environment that is activated: install hints then say ``pip``, not the path of this Python.
os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"

# Tracing makes millions of objects that live on, and a collection walks over all of them: at Python's own
# thresholds 13 % of an export's time. Tests that count objects collect by themselves.
gc.set_threshold(100_000, 20, 50)

# A shell that starts the tests in the background has Ctrl-C ignored, here and in processes that tests start.
signal.signal(signal.SIGINT, signal.default_int_handler)

# How long an example takes depends on what else runs, and a first one on what it loads.
hypothesis.settings.register_profile("std-rt", deadline=None)
hypothesis.settings.load_profile("std-rt")


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> object:
    """Compiled models of tests go to a temporary folder, shared by the whole session."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("STD_RT_CACHE", str(tmp_path_factory.mktemp("cache")))
        patch.setenv("STD_RT_DATA", str(tmp_path_factory.mktemp("data")))
        yield


@pytest.fixture(scope="session")
def handmade(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """The bundle of `handmade.py`; tests that change it make their own copy."""
    pytest.importorskip("onnx")
    return write_handmade(tmp_path_factory.mktemp("bundles") / "handmade")


@pytest.fixture
def cli(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Cli:
    """``cli("stylize", path, ...)`` runs `std-rt` in this process, through its entry point -> `Result`."""
    from std_rt.cli.app import main

    def run(*arguments: object) -> Result:
        monkeypatch.setattr(sys, "argv", ["std-rt", *(str(argument) for argument in arguments)])
        monkeypatch.setenv("COLUMNS", "200")
        capfd.readouterr()
        with pytest.raises(SystemExit) as exit_:
            main()
        caught = capfd.readouterr()
        code = exit_.value.code
        return Result(code if isinstance(code, int) else int(code is not None), caught.out, caught.err)

    return run
