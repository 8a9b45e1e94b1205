"""A quarter of an hour on a GPU: everything that only a card can answer, in two calls of a few commands each.

    make gpu                          # both calls, on the GPU here or on the simulated one
    python -m tools.gpu_session 2     # the second call alone

Each command runs in a process of its own, with a time limit; what it prints is in ``runs/gpu``, and the last
lines say what passed. Without a GPU the same commands run on the made-up GPU of the tests, which shows that
they work and nothing else; what needs more than this machine has is said to be left out.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from importlib import import_module
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np

from std_rt.core.errors import BackendError, BundleError, UsageError
from std_rt.engines import backends
from std_rt.engines.gpu.probe import probe
from std_rt.engines.registry import GPU_BACKENDS
from std_rt.evaluation.bench import sample_frame
from std_rt.pipeline.stylizer import Stylizer
from std_rt.streaming.frame_stream import GROUPED, ONE_BY_ONE, STREAM_BATCH, FrameStream

__all__ = ["CALLS", "Command", "main"]

ROOT = Path(__file__).parents[1]
REPLAYS, FRAMES, SIZE_PX, OTHER_PX = 1000, 6, 128, 192
TIMED_FRAMES, TIMED_PX = 200, 512
MOST_FRAMES = 10_000  # while engines open
MOST_DIFFERENCE = 24  # of 255
FAKE_PATIENCE = 4  # times the limit on the simulated GPU, which computes on the processor
MODES = (("none", None), ("full", 3.0), ("residual", 3.0))


@dataclass(frozen=True)
class Command:
    """``arguments`` of Python; ``needs`` packages; ``on_fake``: further arguments without a GPU, None if it
    is then left out.
    """

    name: str
    arguments: tuple[str, ...]
    limit_s: int
    needs: tuple[str, ...] = ()
    on_fake: tuple[str, ...] | None = ()


def _step(name: str, limit_s: int, on_fake: tuple[str, ...] | None = ()) -> Command:
    return Command(name, ("-m", "tools.gpu_session", name), limit_s, on_fake=on_fake)


def _cli(
    name: str,
    *arguments: str,
    limit_s: int,
    needs: tuple[str, ...] = (),
    on_fake: tuple[str, ...] | None = (),
) -> Command:
    return Command(name, ("-m", "std_rt", *arguments), limit_s, needs, on_fake)


_LIVE = ("bench", "--live", "--duration", "10")
CALLS = {
    "1": (
        _step("driver", 60),
        _cli("doctor", "doctor", "--gpu", limit_s=240),
        _cli("first-frame", "bench", "--first-frame", limit_s=120, on_fake=None),
    ),
    "2": (
        Command("tests", ("-m", "pytest", "-q", "-m", "gpu", "tests/unit"), 120, ("pytest",)),
        _step("modes", 240),
        _step("capture", 120),
        _cli(
            "against",
            "bench",
            "--against",
            "diffusers",
            limit_s=120,
            needs=("torch", "diffusers"),
            on_fake=None,
        ),
        _step("nhwc", 90, on_fake=None),
        _cli("live", *_LIVE, limit_s=60, on_fake=("--duration", "30", "--size", "64", "--steps", "1")),
    ),
}


def main(arguments: list[str]) -> int:
    """Run the calls named (all: without arguments), or one step in this process; 1 if something failed."""
    if arguments and arguments[0] in STEPS:
        if os.environ.get("STD_RT_FAKE_GPU"):
            _install_fake()
        print(json.dumps(STEPS[arguments[0]]()))
        return 0
    problem = probe().problem
    folder = ROOT / "runs" / "gpu"
    folder.mkdir(parents=True, exist_ok=True)
    if problem is not None:
        print(f"{problem}: the same commands run on the simulated GPU of the tests; their times mean nothing")
    else:
        print(", ".join(map(str, probe().gpus)))
    results = []
    for command in (command for call in arguments or CALLS for command in CALLS[call]):
        results.append(_run(command, folder, fake=problem is not None))
        # After each: what is known stays known if the machine goes away.
        (folder / "summary.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    return int(any(result["outcome"].startswith("failed") for result in results))


def _run(command: Command, folder: Path, *, fake: bool) -> dict[str, Any]:
    """Run one command and print its line."""
    begun = time.monotonic()
    missing = [name for name in command.needs if find_spec(name) is None]
    if missing:
        outcome = f"left out: {', '.join(missing)} is not installed"
    elif fake and command.on_fake is None:
        outcome = "left out: it only times a GPU"
    else:
        outcome = _outcome(command, folder / f"{command.name}.txt", fake)
    seconds = time.monotonic() - begun
    print(f"{command.name:12} {seconds:6.1f} s  {outcome}", flush=True)
    return {**asdict(command), "outcome": outcome, "seconds": round(seconds, 1), "simulated": fake}


def _outcome(command: Command, output: Path, fake: bool) -> str:
    """Run it with its output in a file."""
    start = [sys.executable, *command.arguments]
    limit_s = command.limit_s * (FAKE_PATIENCE if fake else 1)
    paths = [str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    if fake:
        environment["STD_RT_FAKE_GPU"] = "1"
        if command.arguments[:2] == ("-m", "std_rt"):
            code = "from tools.gpu_session import run_cli; run_cli()"
            start = [sys.executable, "-c", code, *command.arguments[2:]]
        start += command.on_fake or ()
    with output.open("w", encoding="utf-8") as file:
        try:
            code_ = subprocess.run(
                start,
                cwd=ROOT,
                env=environment,
                stdout=file,
                stderr=subprocess.STDOUT,
                timeout=limit_s,
            ).returncode
        except subprocess.TimeoutExpired:
            return f"failed: not done after {limit_s} s; see {output}"
        except OSError as error:
            return f"failed: does not start: {error}"
    nothing = command.arguments[1] == "pytest" and code_ == 5  # no test was selected
    return "passed" if code_ == 0 or nothing else f"failed: exit {code_}; see {output}"


def run_cli() -> None:
    """``std-rt`` on the simulated GPU, in this process."""
    from std_rt.cli.app import main as command_line

    _install_fake()
    command_line()


def _install_fake() -> None:
    import_module("support.fake_gpu").install()


def _usable() -> list[str]:
    found = [info.name for info in backends() if info.available and info.name in GPU_BACKENDS]
    if not found:
        raise BackendError("no GPU backend is installed; see std-rt doctor")
    return found


def step_driver() -> dict[str, Any]:
    """Memory, copies, a captured graph replayed many times, and the message when memory is short."""
    from std_rt.engines.gpu.driver import cuda_device

    device = cuda_device()
    device.bind()
    kind = np.dtype(np.float32)
    stream, address = device.stream(), device.allocate(4096 * kind.itemsize)
    given, back = device.pinned((4096,), kind), device.pinned((4096,), kind)

    def record() -> None:
        device.upload(address, given, stream)
        device.download(back, address, stream)

    graph = device.capture(stream, record)
    for i in range(REPLAYS):
        given[...] = i
        device.launch(graph, stream)
        device.synchronize(stream)
        if not (back == i).all():
            raise BackendError(f"replay {i} brought back {back[:4]}")
    try:
        device.allocate(2 * device.gpu.memory_bytes)
    except BackendError as error:
        return {"gpu": str(device.gpu), "driver": device.driver, "replays": REPLAYS, "short": str(error)}
    raise BackendError("twice the memory of the GPU was granted")


def step_modes() -> dict[str, Any]:
    """Every guidance mode and batching mode on every backend, against the CPU: the largest difference."""
    found: dict[str, Any] = {}
    for mode, scale in MODES:
        for batching in (ONE_BY_ONE, STREAM_BATCH, GROUPED):
            try:
                expected = _stream("cpu", mode, scale, batching)
            except (UsageError, BundleError) as error:
                found[f"{mode}, {batching}"] = f"left out: {error}"
                continue
            for name in _usable():
                styled = _stream(name, mode, scale, batching)
                difference = int(np.abs(styled.astype(int) - expected).max())
                found[f"{name}: {mode}, {batching}"] = difference
                if difference > MOST_DIFFERENCE:
                    raise BackendError(f"{name}, {mode}, {batching}: differs by {difference} of 255")
    return found


def _stream(backend: str, mode: str, scale: float | None, batching: str) -> np.ndarray[Any, Any]:
    with Stylizer.load(
        None,
        backend=backend,
        precision="fp32" if backend == "cpu" else "auto",  # not int8, which some processors take
        size=SIZE_PX,
        steps=2,
        guidance=scale,
        guidance_mode=mode if scale else None,
    ) as stylizer:
        stylizer.set_style(sample_frame(256, 256, seed=1))
        frames = [sample_frame(SIZE_PX, SIZE_PX, seed) for seed in range(FRAMES)]
        return np.stack(list(FrameStream(stylizer, batching=batching).frames(frames)))


def step_capture() -> dict[str, Any]:
    """Frames that run while other sizes are opened and styles are encoded: the same picture every time."""
    done = {}
    for name in _usable():
        with Stylizer.load(None, backend=name, size=SIZE_PX, steps=2) as stylizer:
            stylizer.set_style(sample_frame(256, 256, seed=1))
            frame = sample_frame(SIZE_PX, SIZE_PX)
            expected = stylizer.stylize(frame)
            errors: list[Exception] = []
            over = threading.Event()
            opening = threading.Thread(target=_disturb, args=(stylizer, errors, over))
            opening.start()
            try:
                for count in islice(_counting(opening), MOST_FRAMES):
                    if not np.array_equal(stylizer.stylize(frame), expected):
                        raise BackendError(
                            f"{name}: another picture after {count} frames, while engines opened"
                        )
            finally:
                over.set()  # else it waits for ever for what a closed stylizer no longer opens
                opening.join()
            if errors:
                raise errors[0]
            done[name] = count + 1
    return {"frames": done}


def step_nhwc() -> dict[str, Any]:
    """Backend ``cuda`` in the provider's own layout and with channels last: ms a frame, the difference."""
    if "cuda" not in _usable():
        return {"left out": "backend cuda is not installed"}
    from std_rt.engines.onnxruntime import cuda

    options = cuda.provider_options
    found: dict[str, Any] = {}
    pictures = []
    for layout in ("0", "1", "0", "1"):

        def changed(*given: Any, layout: str = layout, **named: Any) -> dict[str, str]:
            return options(*given, **named) | {"prefer_nhwc": layout}

        with mock.patch.object(cuda, "provider_options", changed), _opened_cuda() as stylizer:
            frame = sample_frame(TIMED_PX, TIMED_PX)
            pictures.append(stylizer.stylize(frame))
            begun = time.perf_counter()
            for _ in range(TIMED_FRAMES):
                stylizer.stylize(frame)
            ms = 1000 * (time.perf_counter() - begun) / TIMED_FRAMES
        found.setdefault("channels last" if layout == "1" else "as it is", []).append(round(ms, 3))
    difference = np.abs(pictures[0].astype(int) - pictures[1]).max()
    return {"ms a frame": found, "largest difference": int(difference)}


def _opened_cuda() -> Stylizer:
    stylizer = Stylizer.load(None, backend="cuda", size=TIMED_PX, steps=2)
    stylizer.set_style(sample_frame(256, 256, seed=1))
    return stylizer


def _counting(thread: threading.Thread) -> Iterator[int]:
    count = 0
    while thread.is_alive() or count < FRAMES:
        yield count
        count += 1


def _disturb(stylizer: Stylizer, errors: list[Exception], over: threading.Event) -> None:
    """What may happen beside frames until they are ``over``: another size opens, a style is encoded."""
    try:
        quality = stylizer.quality(OTHER_PX, OTHER_PX, size=OTHER_PX)
        stylizer.prepare_qualities([quality])
        stylizer.encode_style(sample_frame(256, 256, seed=2))
        while not stylizer.ready(quality):
            if over.wait(0.01):
                raise BackendError(f"{OTHER_PX} px is still not open after all frames")
    except Exception as error:  # noqa: BLE001 (raised in the main thread)
        errors.append(error)


STEPS: dict[str, Callable[[], dict[str, Any]]] = {
    "driver": step_driver,
    "modes": step_modes,
    "capture": step_capture,
    "nhwc": step_nhwc,
}


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
