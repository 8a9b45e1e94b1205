"""Load on `std-rt serve`: several sessions at once against one, over WebSockets, and against `std-rt live`.

    std-rt serve --no-open --port 8765 &                        # the server to be measured
    python tools/serve_load.py --sessions 8 --seconds 60        # throughput, fairness, starvation
    python tools/serve_load.py --sessions 1 --seconds 1200      # flat over 20 minutes: see "minutes"
    std-rt bench --live                                          # the latency to hold the first one against

A session sends a frame as soon as it has the last result, so the engines are never idle; a result counts as
painted when its JPEG is decoded. Prints a table, and one line of JSON. Needs the extra [serve].
"""

from __future__ import annotations

import argparse
import json
import struct
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from io import BytesIO
from itertools import pairwise
from typing import Any

import numpy as np
from PIL import Image
from websockets.sync.client import connect

_HEADER = struct.Struct("<IId")
_MINUTE_S = 60.0


@dataclass
class Client:
    """What one session has seen: when each result was painted, in s from the start, and its latency in ms."""

    at_s: list[float] = field(default_factory=list)
    latency_ms: list[float] = field(default_factory=list)
    longest_gap_s: float = 0.0


def frames(side_px: int) -> list[bytes]:
    """A few JPEGs of moving noise, so that no frame is like the one before."""
    small = np.random.default_rng(0).integers(0, 256, (side_px // 8, side_px // 8, 3), np.uint8)
    large = np.asarray(Image.fromarray(small).resize((side_px, side_px)))
    encoded = []
    for step in range(8):
        buffer = BytesIO()
        Image.fromarray(np.roll(large, 4 * step, axis=1)).save(buffer, "JPEG", quality=85)
        encoded.append(buffer.getvalue())
    return encoded


def run_session(url: str, seconds: float, side_px: int) -> Client:
    """One session, closed after ``seconds``; the time until its first result does not count."""
    client, pictures = Client(), frames(side_px)
    with connect(url, compression=None, max_size=None) as socket:
        began_s, number = 0.0, 0
        while not began_s or time.perf_counter() < began_s + seconds:
            number += 1
            sent_s = time.perf_counter()
            socket.send(_HEADER.pack(number, number - 1, 1000 * sent_s) + pictures[number % 8])
            while isinstance(message := socket.recv(timeout=120), str):
                if "error" in json.loads(message):
                    raise SystemExit(f"the server refused: {message}")
            Image.open(BytesIO(message[_HEADER.size :])).load()
            now_s = time.perf_counter()
            if not began_s:  # engines were opened for it
                began_s = now_s
                continue
            client.at_s.append(now_s - began_s)
            client.latency_ms.append(1000 * (now_s - sent_s))
    times = [0.0, *client.at_s]
    client.longest_gap_s = max(b - a for a, b in pairwise(times)) if client.at_s else seconds
    return client


def measure(url: str, count: int, seconds: float, side_px: int) -> dict[str, Any]:
    """``count`` sessions at once."""
    with ThreadPoolExecutor(count) as pool:
        clients = [
            each.result() for each in [pool.submit(run_session, url, seconds, side_px) for _ in range(count)]
        ]
    rates = [len(client.at_s) / seconds for client in clients]
    medians = [float(np.median(client.latency_ms)) for client in clients if client.latency_ms]
    latency = np.concatenate([client.latency_ms for client in clients])
    return {
        "sessions": count,
        "fps": round(sum(rates), 2),
        "fps_of_each": [round(rate, 2) for rate in rates],
        "latency_p50_ms": round(float(np.percentile(latency, 50)), 1),
        "latency_p95_ms": round(float(np.percentile(latency, 95)), 1),
        "latency_spread": round(max(medians) / min(medians) - 1, 3),
        "longest_gap_s": round(max(client.longest_gap_s for client in clients), 2),
        "minutes": by_minute(clients, seconds),
    }


def by_minute(clients: list[Client], seconds: float) -> list[dict[str, float]]:
    """Rate and median latency of each minute: a leak or heat shows as a slope."""
    rows = []
    for begin in np.arange(0, seconds, _MINUTE_S):
        length = min(_MINUTE_S, seconds - begin)
        latency = [
            ms
            for client in clients
            for at, ms in zip(client.at_s, client.latency_ms, strict=True)
            if begin <= at < begin + length
        ]
        median = round(float(np.median(latency)), 1) if latency else 0.0
        rows.append({"fps": round(len(latency) / length, 2), "latency_p50_ms": median})
    return rows


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument(
        "--url", default="ws://127.0.0.1:8765/v1/stream", help="with ?token=... if it has one"
    )
    parser.add_argument("--sessions", type=int, default=8)
    parser.add_argument("--seconds", type=float, default=60.0, help="of each of the two runs")
    parser.add_argument("--size", type=int, default=256, help="side of the frames sent, in px")
    options = parser.parse_args()
    counts = dict.fromkeys([1, options.sessions])
    found = [measure(options.url, count, options.seconds, options.size) for count in counts]
    print(f"{'sessions':>8} {'fps':>7} {'p50 ms':>7} {'p95 ms':>7} {'spread':>7} {'longest gap s':>14}")
    for row in found:
        print(
            f"{row['sessions']:8} {row['fps']:7} {row['latency_p50_ms']:7} {row['latency_p95_ms']:7} "
            f"{row['latency_spread']:7.0%} {row['longest_gap_s']:14}"
        )
    share = found[-1]["fps"] / found[0]["fps"]
    starved = min(found[-1]["fps_of_each"]) == 0
    print(json.dumps({"throughput_share": round(share, 3), "starved": starved, "runs": found}))


if __name__ == "__main__":
    main()
