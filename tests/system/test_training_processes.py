"""Training in processes of its own: killed at random moments, on a full disk, and several at once."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support.distil_runs import ADVERSARIAL, assert_same, read_checkpoint, small_recipe, write_triplets
from support.motion_training import motion_recipe, write_clips, write_dino, write_motion_base
from support.pipelines import write_own_pipeline

from std_rt.core.errors import RecipeError
from std_rt.training.distil.loop import train_distil
from std_rt.training.run.checkpoint import load_state
from std_rt.training.run.recipe import BankConfig, DistilConfig, as_dict


@pytest.fixture(autouse=True)
def _one_thread() -> object:
    """As the processes that are started here have."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def config(tmp_path: Path) -> DistilConfig:
    base = write_own_pipeline(tmp_path / "tiny", levels=1, sees_content=True)
    return small_recipe(tmp_path / "run", base, write_triplets(tmp_path / "triplets"))


def _keep_recipe(config: DistilConfig) -> Path:
    """A run folder that another process can take the recipe from."""
    folder = Path(config.output)
    folder.mkdir(parents=True)
    (folder / "recipe.json").write_text(json.dumps(as_dict(config)), encoding="utf-8")
    return folder


RUN = """
import sys
from pathlib import Path
import torch
torch.set_num_threads(1)
from std_rt.training.distil.loop import train_distil
from std_rt.training.run.recipe import load_run_recipe
train_distil(load_run_recipe(Path(sys.argv[1])))
"""


@pytest.mark.long  # resuming itself: tests/torch/training/test_distil.py
def test_killed_at_random_moments_and_resumed_it_ends_as_if_unbroken(
    config: DistilConfig, tmp_path: Path
) -> None:
    """SIGKILL, with no chance to clean up. STD_RT_KILLS=10 for the long version."""
    config = replace(config, adversarial=ADVERSARIAL, steps=24, snapshot_every=1)
    whole, broken = (replace(config, output=str(tmp_path / name)) for name in ("whole", "broken"))
    script = tmp_path / "run.py"
    script.write_text(RUN, encoding="utf-8")
    train_distil(whole)
    folder, rng = _keep_recipe(broken), random.Random(0)
    kills = int(os.environ.get("STD_RT_KILLS", "2"))
    for n in range(kills):
        goal = 1 + n * 20 // kills
        process = subprocess.Popen(
            [sys.executable, str(script), str(folder)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        while process.poll() is None and _newest(folder) < goal:
            time.sleep(0.005)
        time.sleep(rng.uniform(0, 0.3))
        process.kill()
        assert process.wait() != 0, "the run ended before it was killed"
    train_distil(broken)
    assert_same(read_checkpoint(whole), read_checkpoint(broken))
    assert (Path(whole.output) / "log.jsonl").read_bytes() == (folder / "log.jsonl").read_bytes()
    left = [p.name for p in folder.rglob("*") if ".part" in p.name]
    assert not left


def _newest(folder: Path) -> int:
    try:
        return int((folder / "checkpoints" / "newest").read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return 0


TWO_PROCESSES = """
import hashlib, json, sys
from dataclasses import replace
from pathlib import Path
from accelerate import PartialState
from std_rt.training.distil import loop as distil
from std_rt.training.run.recipe import load_run_recipe
from std_rt.training.tiny.triplets import TripletSource

state = PartialState(cpu=True)
kept, pool = {}, []


def digest(tensors):
    return hashlib.sha256(b"".join(v.detach().numpy().tobytes() for v in tensors)).hexdigest()


parameters, adversary, start = distil.lora_parameters, distil.Adversary, TripletSource.__init__


def keep_lora(unet):
    kept["lora"] = parameters(unet)
    return kept["lora"]


def keep_heads(*args, **kwargs):
    kept["heads"] = adversary(*args, **kwargs)
    return kept["heads"]


def keep_pool(self, *args, **kwargs):
    start(self, *args, **kwargs)
    pool.extend(hashlib.sha256(photo.tobytes()).hexdigest() for photo, _, _ in self.triplets.items)


distil.lora_parameters, distil.Adversary, TripletSource.__init__ = keep_lora, keep_heads, keep_pool
config = load_run_recipe(Path(sys.argv[1]))
distil.train_distil(config)
found = {
    "world": state.num_processes,
    "lora": digest(kept["lora"].values()),
    "heads": digest(kept["heads"].heads.state_dict().values()),
    "pool": pool,
}
broken = replace(config, output=config.output + "-broken")
distil.train_distil(broken, stop_after=3)
distil.train_distil(broken)
Path(sys.argv[1], f"out{state.process_index}.json").write_text(json.dumps(found))
"""


# Two hosts as far as the network is concerned: each has a network namespace, joined by a cable.
# $0: the script, $1: its run folder, then what launches it.
TWO_HOSTS = """
ip link set lo up
ip link add to1 type veth peer name to0
unshare -n sh -c '
    until ip link set to0 up 2>/dev/null; do sleep 0.1; done  # it is not here yet
    ip link set lo up
    ip addr add 10.18.0.2/24 dev to0
    folder=$1; shift
    GLOO_SOCKET_IFNAME=to0 exec "$@" --machine_rank 1 "$0" "$folder"' "$0" "$@" &
other=$!
until [ "$(readlink /proc/$other/ns/net)" != "$(readlink /proc/$$/ns/net)" ]; do sleep 0.1; done
ip link set to0 netns $other
ip addr add 10.18.0.1/24 dev to1
ip link set to1 up
folder=$1; shift
GLOO_SOCKET_IFNAME=to1 "$@" --machine_rank 0 "$0" "$folder" || { kill $other; exit 1; }
wait $other
"""


def _launch_on_hosts(script: Path, folder: Path) -> list[str]:
    """docs/training.md's command on each of two hosts. Skips where users may not have namespaces."""
    allowed = ["unshare", "-rn", "ip", "link", "add", "to1", "type", "veth", "peer", "name", "to0"]
    try:
        subprocess.run(allowed, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"no network namespaces here: {error}")
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_machines", "2"]
    launch += ["--num_processes", "2", "--main_process_ip", "10.18.0.1", "--main_process_port", "29500"]
    return ["unshare", "-rn", "sh", "-c", TWO_HOSTS, str(script), str(folder), *launch]


def _two_processes(script: str, config: DistilConfig, tmp_path: Path, hosts: int = 1) -> list[dict[str, Any]]:
    """What ``script`` leaves in ``outRANK.json`` of the run folder that it is given."""
    folder, path = _keep_recipe(config), tmp_path / "two.py"
    path.write_text(script, encoding="utf-8")
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    launch = _launch_on_hosts(path, folder) if hosts == 2 else [*launch, str(path), str(folder)]
    env = os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    done = subprocess.run(launch, capture_output=True, encoding="utf-8", env=env, timeout=400 * hosts)
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads((folder / f"out{rank}.json").read_text(encoding="utf-8")) for rank in (0, 1)]


@pytest.mark.parametrize("hosts", [1, pytest.param(2, marks=pytest.mark.long)])
def test_two_processes_agree_see_different_data_and_resume(
    config: DistilConfig, tmp_path: Path, hosts: int
) -> None:
    """Acceptance tests 5 and 6 with two ranks, the adversarial loss and accumulation."""
    config = replace(config, adversarial=ADVERSARIAL, accumulate=2, steps=4)
    one, two = _two_processes(TWO_PROCESSES, config, tmp_path, hosts)
    assert (one["world"], two["world"]) == (2, 2)
    assert one["lora"] == two["lora"]
    assert one["heads"] == two["heads"]
    assert not set(one["pool"]) & set(two["pool"])
    assert len(set(one["pool"]) | set(two["pool"])) == 6
    resumed = replace(config, output=config.output + "-broken")
    whole = read_checkpoint(config)
    assert any(name.startswith("rank1") for name in whole)
    assert not torch.equal(whole["rank0.safetensors/generator"], whole["rank1.safetensors/generator"])
    assert_same(whole, read_checkpoint(resumed))
    with pytest.raises(RecipeError, match="trained by 2 processes, now there are 1"):
        train_distil(replace(config, steps=5))


TWO_ON_CLIPS = """
import hashlib, json, sys
from dataclasses import replace
from pathlib import Path
from accelerate import PartialState
from std_rt.training.data.picture_source import PictureSource
from std_rt.training.distil import loop as distil
from std_rt.training.run.recipe import load_run_recipe

state = PartialState(cpu=True)
kept, seen, take = {}, [], PictureSource.take


class Run(distil.Run):
    def __init__(self, config, parts, *args, **kwargs):
        kept.update({n: p if isinstance(p, dict) else p.state_dict() for n, p in parts.items()})
        super().__init__(config, parts, *args, **kwargs)


def noted(self, n, shape):
    fresh = take(self, n, shape)
    seen.extend(name.split("#")[0] for name in fresh.names)
    return fresh


distil.Run, PictureSource.take = Run, noted
config = load_run_recipe(Path(sys.argv[1]))
distil.train_distil(config)
found = {"seen": seen[:2]}
for name, part in kept.items():
    found[name] = hashlib.sha256(b"".join(v.detach().numpy().tobytes() for v in part.values())).hexdigest()
broken = replace(config, output=config.output + "-broken")
distil.train_distil(broken, stop_after=3)
distil.train_distil(broken)
Path(sys.argv[1], f"out{state.process_index}.json").write_text(json.dumps(found))
"""


@pytest.mark.long
def test_two_processes_on_clips_agree_see_different_clips_and_resume(tmp_path: Path) -> None:
    """The motion head and its average too, with accumulation and the adversarial loss."""
    base, clips = write_motion_base(tmp_path / "base"), write_clips(tmp_path / "clips")
    config = motion_recipe(tmp_path / "run", base, clips, write_dino(tmp_path / "dino"))
    config = replace(config, batch=1, accumulate=2, bank=BankConfig(capacity=2, spread=False))
    one, two = _two_processes(TWO_ON_CLIPS, config, tmp_path)
    assert one.keys() == {"lora", "average", "heads", "motion_head", "motion_head_average", "seen"}
    assert [name for name in one if one[name] != two[name]] == ["seen"]
    assert not set(one["seen"]) & set(two["seen"])
    assert_same(read_checkpoint(config), read_checkpoint(replace(config, output=config.output + "-broken")))


LIMITED = """
import resource, sys
from pathlib import Path
import torch
from std_rt.core.errors import RecipeError
from std_rt.training.run.checkpoint import save_state

path = Path(sys.argv[1])
save_state(path, {"value": torch.ones(10)}, {"step": 1})
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
try:
    save_state(path, {"value": torch.ones(100_000)}, {"step": 2})
except RecipeError as error:
    print(error)
"""


@pytest.mark.skipif(os.name != "posix", reason="the limit on file sizes is POSIX's")
def test_a_write_that_really_fails_leaves_the_last_good_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "state.safetensors"
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, str(path)], capture_output=True, text=True, check=True, timeout=240
    )
    assert "could not be written" in done.stdout
    assert f"the previous checkpoint, {path}, is intact" in done.stdout
    tensors, meta = load_state(path)
    assert meta == {"step": 1}
    assert torch.equal(tensors["value"], torch.ones(10))
    assert [p.name for p in tmp_path.iterdir()] == ["state.safetensors"]
