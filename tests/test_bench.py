"""The clock, the statistics and the table of `std-rt bench`, without waiting."""

from __future__ import annotations

import pytest

from std_rt.bench import STAGES, StageClock, Timing, measure, sample_frame


def test_the_clock_gives_every_millisecond_to_one_stage() -> None:
    times = iter([0.0, 0.0, 0.010, 0.030, 0.035, 0.040])
    clock = StageClock(lambda: next(times))
    clock.start()
    clock("unet")
    clock("scheduler")
    clock("unet")
    clock.finish()
    assert clock.frames[0] == pytest.approx({"unet": 15.0, "scheduler": 20.0, "total": 40.0})


def test_medians_percentiles_and_fps() -> None:
    frames = [{"unet": float(ms), "total": 2.0 * ms} for ms in range(1, 102)]
    timing = Timing.of(frames)
    assert timing.median_ms["unet"] == 51
    assert timing.p95_ms["total"] == pytest.approx(192)
    assert timing.fps == pytest.approx(1000 / 102)
    assert timing.median_ms["vae_encoder"] == 0
    assert set(timing.median_ms) == set(STAGES)


def test_warm_up_frames_are_run_and_not_counted() -> None:
    calls = []

    def step(mark: object) -> None:
        calls.append(mark)

    timing = measure(step, frames=5, warmup=3)
    assert len(calls) == 8
    assert timing.median_ms["total"] >= 0


def test_the_test_frame_is_the_same_every_time() -> None:
    assert (sample_frame(24, 40) == sample_frame(24, 40)).all()
    assert sample_frame(24, 40).shape == (24, 40, 3)
