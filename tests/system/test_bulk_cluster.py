"""`std-rt bulk` on Ray's test cluster: the same bytes on two machines as on one, and kills lose nothing."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from support.cli_support import picture

from std_rt.core.bundle import Bundle

ray = pytest.importorskip("ray")
parquet = pytest.importorskip("pyarrow.parquet")
pytestmark = [pytest.mark.long, pytest.mark.filterwarnings("ignore::DeprecationWarning:ray.*")]

COUNT = 60
_PATIENCE_S = 900  # processes start slowly where others work too


@pytest.fixture(scope="module")
def items(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with pictures in two shapes and a style."""
    folder = tmp_path_factory.mktemp("bulk")
    for index in range(COUNT):
        picture(folder / "in" / f"{index:03}.png", *((60, 40), (40, 60))[index % 2], seed=index)
    picture(folder / "art.png", 32, 32, seed=1)
    return folder


@pytest.fixture
def cluster() -> Iterator[Any]:
    """A head and one more node, of two processors each."""
    from ray.cluster_utils import Cluster

    found = Cluster(
        initialize_head=True,
        head_node_args={"num_cpus": 2, "object_store_memory": 100 << 20, "include_dashboard": False},
    )
    found.second = found.add_node(num_cpus=2, object_store_memory=100 << 20)
    found.wait_for_nodes()
    yield found
    ray.shutdown()
    found.shutdown()


def start(items: Path, bundle: Bundle, out: Path, address: str | None) -> subprocess.Popen[str]:
    """The command in a process of its own."""
    where = () if address is None else ("--address", address)
    command = [sys.executable, "-m", "std_rt", "bulk", items / "in", "-s", items / "art.png", "-o", out]
    return subprocess.Popen(
        [*map(str, command), "-b", str(bundle.path), "--size", "64", *where],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def contents(out: Path) -> dict[str, bytes]:
    """Every result by name; nothing half-written lies beside them."""
    assert not [*out.glob(".*.part*")]
    return {path.name: path.read_bytes() for path in sorted(out.glob("*.png"))}


@pytest.fixture(scope="module")
def alone(items: Path, handmade: Bundle) -> dict[str, bytes]:
    """The results of one machine."""
    done = start(items, handmade, items / "alone", None)
    said = done.communicate(timeout=_PATIENCE_S)[0]
    assert done.returncode == 0, said
    found = contents(items / "alone")
    assert len(found) == COUNT
    return found


def workers(name: str) -> list[int]:
    """Ids of the processes that run a stage, by Ray's name for them."""
    found = []
    for process in Path("/proc").iterdir():
        try:
            title = (process / "cmdline").read_bytes().replace(b"\0", b" ").decode()
        except OSError:
            continue
        if process.name.isdigit() and title.startswith("ray::") and name in title:
            found.append(int(process.name))
    return found


def kill_engine(cluster: Any, chance: random.Random) -> bool:
    return kill(workers("PaintBlock"), chance)


def kill_worker(cluster: Any, chance: random.Random) -> bool:
    return kill(workers("ReadBlock") + workers("WriteBlock"), chance)


def kill_node(cluster: Any, chance: random.Random) -> bool:
    if cluster.second is None or not workers("PaintBlock"):
        return False
    cluster.remove_node(cluster.second, allow_graceful=False)
    cluster.second = None
    return True


def kill(pids: list[int], chance: random.Random) -> bool:
    for pid in chance.sample(pids, min(1, len(pids))):
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            return False
    return bool(pids)


@pytest.mark.parametrize("what", [None, kill_engine, kill_worker, kill_node])
def test_two_nodes_give_what_one_gives_whatever_dies(
    cluster: Any,
    alone: dict[str, bytes],
    items: Path,
    handmade: Bundle,
    what: Callable[[Any, random.Random], bool] | None,
) -> None:
    out = items / f"cluster-{getattr(what, '__name__', 'quiet')}"
    job = start(items, handmade, out, cluster.address)
    chance, killed, deadline_s = random.Random(18), 0, time.monotonic() + _PATIENCE_S
    while job.poll() is None and time.monotonic() < deadline_s:
        time.sleep(chance.uniform(0.1, 1.0))
        if what is not None and killed < 2 and [*out.glob("*.png")]:
            killed += what(cluster, chance)
    job.kill()
    said = job.communicate()[0]
    assert job.returncode == 0, said
    assert what is None or killed or what is kill_worker, "nothing was killed: the job was too short"
    assert contents(out) == alone
    recorded = Counter(parquet.read_table(out / "manifest")["output"].to_pylist())
    assert recorded == Counter(alone.keys())


def test_a_killed_command_goes_on(alone: dict[str, bytes], items: Path, handmade: Bundle) -> None:
    out = items / "killed"
    job = start(items, handmade, out, None)
    while not [*out.glob("*.png")] and job.poll() is None:
        time.sleep(0.05)
    job.kill()
    job.communicate()
    job = start(items, handmade, out, None)
    said = job.communicate(timeout=_PATIENCE_S)[0]
    assert job.returncode == 0, said
    assert contents(out) == alone
