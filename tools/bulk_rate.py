"""The rate of `std-rt bulk` on this machine against a plain loop over the same pictures, engines warm.

    python -m tools.bulk_rate                      # 2,000 pictures of mixed sizes; the bar is 0.9
    python -m tools.bulk_rate --count 200 --size 256 --temporary /scratch

The loop reads, stylizes and writes one picture after the other with one `Stylizer`, all in one process. Rates
count from the first picture (the first block of the job) on, so neither opens its engines in that time. Two
rounds each, in turn, as machines change their speed. Memory is flat if its peaks half-way are those of the
end. Prints a line a round, and one line of JSON. Needs the extra [bulk].
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from std_rt import Stylizer
from std_rt.bulk import BulkOptions
from std_rt.bulk.cluster import connected, engines_for
from std_rt.bulk.job import Job, Report, run
from std_rt.bulk.plan import items, wishes
from std_rt.core.bundle import load_bundle
from std_rt.media.image import read_picture, write_picture
from tools.canvas import noise

SIZES = ((1024, 768), (640, 960), (512, 512), (400, 300), (1600, 1200))  # (W, H) px
SUFFIXES = (".jpg", ".jpg", ".png")


def render(folder: Path, count: int) -> list[Path]:
    """Pictures of soft coloured clouds, no two alike."""
    paths = []
    for index in range(count):
        rng, (width, height) = np.random.default_rng(index), SIZES[index % len(SIZES)]
        clouds = np.stack([noise(rng, (height, width), 6) for _ in range(3)], axis=-1)
        low, high = clouds.min(), clouds.max()
        path = folder / f"{index:05}{SUFFIXES[index % len(SUFFIXES)]}"
        write_picture(path, ((clouds - low) / (high - low) * 255).astype(np.uint8))
        paths.append(path)
    return paths


def loop_rate(paths: list[Path], art: Path, out: Path, size: int | None) -> float:
    """Pictures/s of the plain loop; each working size is warm before."""
    out.mkdir()
    with Stylizer.load(size=size) as stylizer:
        stylizer.set_style(art)
        for path in paths[: len(SIZES)]:
            stylizer.stylize(read_picture(path).frame)
        begun_s = time.perf_counter()
        for path in paths:
            write_picture(out / path.name, stylizer.stylize(read_picture(path).frame))
        return len(paths) / (time.perf_counter() - begun_s)


def bulk_rate(
    folder: Path, art: Path, out: Path, size: int | None, per_call: int
) -> tuple[float, Report, Report]:
    """Pictures/s of a job from its first results on; its report when half was done, and at the end."""
    bundle = load_bundle()
    options = BulkOptions(digest=bundle.digest, size=size, per_call=per_call)
    plan = items(wishes([str(folder)], [str(art)]), options.made_by(), {})
    times: list[tuple[float, int]] = []
    reports: list[Report] = []

    def take(rows: list[Any], report: Report) -> bool:
        times.append((time.perf_counter(), len(rows)))
        reports.append(replace(report))
        return True

    with connected():
        report = run(Job(plan, options, bundle, str(out), engines_for(options.backend, 0)), take)
    if report.failed or len(times) < 2:
        raise SystemExit(f"{report.failed} failed in {len(times)} blocks; give more pictures with --count")
    after_first = sum(count for _, count in times[1:])
    return after_first / (times[-1][0] - times[0][0]), reports[len(reports) // 2], report


def rounds(count: int, size: int | None, per_call: int, root: Path) -> Iterator[dict[str, float]]:
    photos, art = root / "photos", root / "art.png"
    photos.mkdir()
    paths = render(photos, count)
    write_picture(art, read_picture(paths[2]).frame)
    for number in range(2):
        loop = loop_rate(paths, art, root / f"loop{number}", size)
        bulk, half, report = bulk_rate(photos, art, root / f"bulk{number}", size, per_call)
        yield {
            "loop_per_s": loop,
            "bulk_per_s": bulk,
            "share": bulk / loop,
            "engines_busy": report.engine_share,
            "engine_peak_mb_half_way": half.peak_mb,
            "engine_peak_mb": report.peak_mb,
            "driver_peak_mb_half_way": half.driver_mb,
            "driver_peak_mb": report.driver_mb,
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--count", type=int, default=2000)
    parser.add_argument("--size", type=int, help="working size in px; the bundle's own by default")
    parser.add_argument("--per-call", type=int, default=0, help="as in std-rt bulk; the loop has 1")
    parser.add_argument("--temporary", type=Path, help="a folder with room for 3 GB")
    asked = parser.parse_args()
    found = []
    with TemporaryDirectory(dir=asked.temporary) as root:
        for each in rounds(asked.count, asked.size, asked.per_call, Path(root)):
            print("  ".join(f"{name} {value:.2f}" for name, value in each.items()))
            found.append(each)
    print(json.dumps({"count": asked.count, "size": asked.size, "rounds": found}))


if __name__ == "__main__":
    main()
