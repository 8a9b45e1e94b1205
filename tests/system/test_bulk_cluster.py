"""`std-rt bulk` on Ray's test cluster: the same bytes on two machines as on one, and kills lose nothing."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
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


def finish(job: subprocess.Popen[str]) -> str:
    said = job.communicate(timeout=_PATIENCE_S)[0]
    assert job.returncode == 0, said
    return said


def contents(out: Path) -> dict[str, bytes]:
    """Every result by name; nothing half-written lies beside them."""
    assert not [*out.glob(".*.part*")]
    return {path.name: path.read_bytes() for path in sorted(out.glob("*.png"))}


@pytest.fixture(scope="module")
def alone(items: Path, handmade: Bundle) -> dict[str, bytes]:
    """The results of one machine."""
    finish(start(items, handmade, items / "alone", None))
    found = contents(items / "alone")
    assert len(found) == COUNT
    return found


def workers(name: str) -> list[int]:
    """Ids of the processes of this test's own cluster that run a stage, by Ray's name for them."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            title = (process / "cmdline").read_bytes().replace(b"\0", b" ").decode()
            is_ours = parent(parent(process.name)) == str(os.getpid())
        except OSError:  # it has ended
            continue
        if is_ours and title.startswith("ray::") and name in title:
            found.append(int(process.name))
    return found


def parent(pid: str) -> str:
    """That of a worker is its node's raylet, and that of a raylet is who made the cluster."""
    return Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[1]


def kill_engine(cluster: Any, chance: random.Random) -> bool:
    return kill(workers("PaintBlock"), chance)


def kill_worker(cluster: Any, chance: random.Random) -> bool:
    return kill(workers("ReadBlock") + workers("WriteBlock"), chance)


def kill_node(cluster: Any, chance: random.Random) -> bool:
    """The second node, for which another comes."""
    if not workers("PaintBlock"):
        return False
    cluster.remove_node(cluster.second, allow_graceful=False)
    cluster.second = cluster.add_node(num_cpus=2, object_store_memory=100 << 20)
    return True


def kill(pids: list[int], chance: random.Random) -> bool:
    for pid in chance.sample(pids, min(1, len(pids))):
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            return False
    return bool(pids)


def test_two_nodes_give_what_one_gives(
    cluster: Any, alone: dict[str, bytes], items: Path, handmade: Bundle
) -> None:
    out = items / "cluster"
    finish(start(items, handmade, out, cluster.address))
    assert_all_once(out, alone)


def test_ten_deaths_at_random_moments_lose_and_double_nothing(
    cluster: Any, alone: dict[str, bytes], items: Path, handmade: Bundle
) -> None:
    chance = random.Random(18)
    kills = [kill_engine] * 4 + [kill_worker] * 4 + [kill_node] * 2
    chance.shuffle(kills)
    for number in range(20):  # jobs are short: a few deaths in each, or none
        out = items / f"deaths-{number}"
        job = start(items, handmade, out, cluster.address)
        fatal, begun_s = 0, time.monotonic()
        while job.poll() is None and time.monotonic() < begun_s + _PATIENCE_S:
            time.sleep(chance.uniform(0.1, 1.0))
            if kills and fatal < 3 and [*out.glob("*.png")] and kills[-1](cluster, chance):
                kills.pop()
                fatal += 1
        said = job.communicate(timeout=1)[0]
        if job.returncode == 1:  # an item that was lost three times failed: the same command makes it
            assert "its worker ended without a result" in said
            said = finish(start(items, handmade, out, cluster.address))
        assert job.returncode in (0, 1), said
        assert_all_once(out, alone)
        if not kills:
            return
    pytest.fail(f"{len(kills)} deaths are left: the jobs are too short for them")


def assert_all_once(out: Path, alone: dict[str, bytes]) -> None:
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
    finish(start(items, handmade, out, None))
    assert_all_once(out, alone)


_FULL_DISK = """
mount -t tmpfs -o size=200k tmpfs "$OUT" || exit 77
for size in 200k 32m 32m; do
    mount -o remount,size=$size "$OUT"
    "$@"; echo "=== $?"
    test $size = 32m && test ! -e "$LATE" && cp "$SPARE" "$LATE"
done
cp -r "$OUT/." "$KEPT"
"""


@pytest.mark.skipif(sys.platform != "linux", reason="a small disk is made by Linux's namespaces")
def test_a_full_disk_and_a_vanished_input_are_said_and_made_up_for(
    alone: dict[str, bytes], items: Path, handmade: Bundle, tmp_path: Path
) -> None:
    """Three runs of one command: on a disk too small, without one of its inputs, and with all it needs."""
    out, kept, late = tmp_path / "out", tmp_path / "kept", tmp_path / "in" / "007.png"
    out.mkdir()
    shutil.copytree(items / "in", late.parent)
    late.unlink()
    names = "".join(f"in/{index:03}.png\n" for index in range(COUNT))
    (tmp_path / "list.txt").write_text(names, encoding="utf-8")
    places = {"OUT": out, "KEPT": kept, "LATE": late, "SPARE": items / "in" / late.name}
    command = [
        sys.executable,
        "-m",
        "std_rt",
        "bulk",
        tmp_path / "list.txt",
        "-s",
        items / "art.png",
        "-o",
        out,
    ]
    done = subprocess.run(
        [
            "unshare",
            "-rm",
            "sh",
            "-c",
            _FULL_DISK,
            "sh",
            *map(str, command),
            "-b",
            handmade.path,
            "--size",
            "64",
        ],
        env={**os.environ, **{name: str(place) for name, place in places.items()}},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
        timeout=_PATIENCE_S,
    )
    if done.returncode == 77 or "unshare" in done.stdout[:20]:
        pytest.skip("no user namespaces here")
    full, vanished, last, end = done.stdout.split("=== ")
    assert [said[0] for said in (vanished, last, end)] == ["1", "1", "0"], done.stdout
    assert "is full; free some space and run the same command again" in full
    assert "007.png does not exist" in vanished
    assert "are finished already" in vanished
    assert "1 made, 0 failed" in last
    assert {path.name: path.read_bytes() for path in kept.rglob("*.png")} == alone
