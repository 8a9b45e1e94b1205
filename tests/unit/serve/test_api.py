"""The API: pictures, clips and styles come out as the library paints them."""

from __future__ import annotations

import json
import re
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from support.live_support import wait_until
from support.media_samples import ClipSpec, make_clip, rgb_frames, sound_packets
from support.serve_support import Answer, Frame, Site, decoded, encoded

from std_rt.media.video.transcode import transcode_stream
from std_rt.pipeline.stylizer import Stylizer
from std_rt.serve.library import Library, Uploads
from std_rt.serve.limits import Limits
from std_rt.serve.painting import ClipJobs
from std_rt.serve.protocol import Look
from std_rt.streaming.frame_stream import GROUPED, FrameStream
from std_rt.streaming.temporal import TemporalFilter


def noise(seed: int, height: int = 64, width: int = 64) -> Frame:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def ids(site: Site) -> dict[str, str]:
    return {style.name: style.id for style in site.server.library.all()}


def test_a_picture_comes_out_as_the_stylizer_paints_it(
    site: Site, stylizer: Stylizer, art: dict[str, Frame]
) -> None:
    picture = ("picture", ("../../etc/passwd", encoded(noise(1))))
    sent = site.post("/v1/stylize", picture, ("style", ("a.png", encoded(art["dark"]))))
    named = site.post("/v1/stylize", picture, ("style", ids(site)["dark"]))
    stylizer.set_style(art["dark"])
    expected = stylizer.stylize(noise(1))
    for answer in (sent, named):
        assert answer.status == 200, answer.body
        assert answer.headers["content-type"] == "image/png"
        np.testing.assert_array_equal(decoded(answer.body), expected)


def test_a_large_style_that_is_sent_or_kept_is_resized_once(site: Site, stylizer: Stylizer) -> None:
    side = 5 * stylizer.bundle.style_px
    large = noise(3, side, side)
    large[:, : side // 3] //= 4
    kept = site.post("/v1/styles", ("picture", ("a.png", encoded(large)))).json["id"]
    stylizer.set_style(large)
    for style in (("a.png", encoded(large)), kept):
        answer = site.post("/v1/stylize", ("picture", ("x", encoded(noise(1)))), ("style", style))
        np.testing.assert_array_equal(decoded(answer.body), stylizer.stylize(noise(1)))
    assert site.ask("DELETE", f"/v1/styles/{kept}").status == 204


def test_its_options_are_those_of_the_command(site: Site, stylizer: Stylizer, art: dict[str, Frame]) -> None:
    answer = site.post(
        "/v1/stylize",
        ("picture", ("x", encoded(noise(2, 64, 96)))),
        ("style", ("a.png", encoded(art["dark"]))),
        ("style", ids(site)["light"]),
        *{
            "weights": "1,3",
            "size": 48,
            "steps": 1,
            "strength": 0.5,
            "seed": 5,
            "keep_colours": "true",
        }.items(),
    )
    pairs = [(art["dark"], 1.0), (art["light"], 3.0)]
    with Stylizer.load(stylizer.bundle, backend="openvino", precision="fp32", size=48, steps=1) as alone:
        alone.set_style(pairs, 0.5, keep_colours=True)
        np.testing.assert_array_equal(decoded(answer.body), alone.stylize(noise(2, 64, 96), 5))


def test_a_size_is_what_the_flag_takes(site: Site, stylizer: Stylizer, art: dict[str, Frame]) -> None:
    parts = ("picture", ("x", encoded(noise(2, 64, 96)))), ("style", ids(site)["dark"])
    with Stylizer.load(
        stylizer.bundle, backend="openvino", precision="fp32", size=(32, 48), steps=2
    ) as alone:
        alone.set_style(art["dark"])
        expected = alone.stylize(noise(2, 64, 96))
    for text in ("48x32", "48X32"):
        answer = site.post("/v1/stylize", *parts, ("size", text))
        assert answer.status == 200, answer.body
        np.testing.assert_array_equal(decoded(answer.body), expected)


@pytest.mark.parametrize(
    "words", [("true", "false"), ("1", "0"), ("yes", "NO"), ("on", "Off"), ("TRUE", "False")]
)
def test_switches_are_written_as_people_write_them(site: Site, words: tuple[str, str]) -> None:
    form = [("picture", ("x", encoded(noise(3, 80, 160)))), ("style", ids(site)["dark"]), ("size", 32)]
    (plain, large), (_, kept) = (
        [decoded(site.post("/v1/stylize", *form, (name, word)).body) for word in reversed(words)]
        for name in ("upscale", "keep_colours")
    )
    assert (plain.shape[0] < 80, large.shape) == (True, (80, 160, 3))
    assert not np.array_equal(kept, plain)


def test_alpha_is_kept_and_upscale_brings_the_size_back(site: Site) -> None:
    cut_out = np.dstack([noise(3, 80, 160), np.tile(np.uint8([0, 255]), (80, 80))])
    parts = ("picture", ("x.png", encoded(cut_out))), ("style", ids(site)["dark"]), ("size", 32)
    small = site.post("/v1/stylize", *parts)
    large = site.post("/v1/stylize", *parts, ("upscale", "true"), ("format", "webp"))
    assert decoded(small.body).shape[0] < 80
    assert decoded(large.body).shape == (80, 160, 3)
    assert large.headers["content-type"] == "image/webp"
    with Image.open(BytesIO(large.body)) as picture:
        assert picture.mode == "RGBA"


def test_a_style_is_added_renamed_saved_and_deleted(site: Site, stylizer: Stylizer) -> None:
    data = encoded(noise(4, 40, 40))
    added = site.post("/v1/styles", ("picture", ("..\\my art.png", data)))
    assert added.status == 201
    key = added.json["id"]
    assert added.json["name"] == "..\\my art"
    assert site.post("/v1/styles", ("picture", ("again.png", data))).json["id"] == key
    renamed = site.ask("PATCH", f"/v1/styles/{key}", json.dumps({"name": "waves"}).encode())
    assert renamed.json["name"] == "waves"
    assert decoded(site.get(f"/v1/styles/{key}/thumbnail").body).shape == (40, 40, 3)
    saved = site.get(f"/v1/style-file?style={key}:0.7&style={ids(site)['dark']}:0.3&name=mine").body
    blend = site.post("/v1/styles", ("picture", ("mine.safetensors", saved)))
    picture = ("picture", ("x", encoded(noise(5))))
    one = site.post("/v1/stylize", picture, ("style", blend.json["id"]))
    two = site.post("/v1/stylize", picture, ("style", f"{key}:0.7"), ("style", f"{ids(site)['dark']}:0.3"))
    np.testing.assert_array_equal(decoded(one.body), decoded(two.body))
    for each in (key, blend.json["id"]):
        assert site.ask("DELETE", f"/v1/styles/{each}").status == 204
    assert key not in ids(site).values()
    assert site.ask("DELETE", f"/v1/styles/{key}").status == 404


def test_the_servers_own_styles_stay(site: Site) -> None:
    key = ids(site)["dark"]
    for answer in (
        site.ask("DELETE", f"/v1/styles/{key}"),
        site.ask("PATCH", f"/v1/styles/{key}", b'{"name": "x"}'),
    ):
        assert answer.status == 409
        assert "is the server's own" in answer.error
    assert key in ids(site).values()


def finished(site: Site, made: Answer) -> dict[str, object]:
    assert made.status == 202, made.body
    path = made.headers["location"]
    wait_until(lambda: site.get(path).json["state"] not in ("waiting", "running"))
    return dict(site.get(path).json)


def test_a_clip_comes_out_as_stylize_paints_it_with_its_sound(
    site: Site, stylizer: Stylizer, art: dict[str, Frame], tmp_path: Path
) -> None:
    clip = make_clip(tmp_path / "clip.mp4", ClipSpec(audio="aac"))
    made = site.post("/v1/jobs", ("clip", ("c.mp4", clip.read_bytes())), ("style", ids(site)["dark"]))
    job = finished(site, made)
    assert (job["state"], job["error"]) == ("done", None)
    result = tmp_path / "result.mp4"
    result.write_bytes(site.get(f"/v1/jobs/{job['id']}/result").body)
    stylizer.set_style(art["dark"])
    stream = FrameStream(stylizer, batching=GROUPED, temporal=TemporalFilter("full"))
    expected = tmp_path / "expected.mp4"
    transcode_stream(clip, expected, stream.frames)
    np.testing.assert_array_equal(rgb_frames(result), rgb_frames(expected))
    assert sound_packets(result) == sound_packets(clip)
    assert len(rgb_frames(result)) == job["frames"]
    assert site.ask("DELETE", f"/v1/jobs/{job['id']}").status == 204
    assert site.get(f"/v1/jobs/{job['id']}/result").status == 404
    assert not list(site.server.uploads.folder.iterdir()), "uploads and results are gone"


def test_a_job_can_be_cancelled_and_leaves_nothing(site: Site, tmp_path: Path) -> None:
    clip = make_clip(tmp_path / "long.mp4", ClipSpec(pts=tuple(range(300))))
    parts = ("clip", ("c.mp4", clip.read_bytes())), ("style", ids(site)["dark"])
    made = [site.post("/v1/jobs", *parts) for _ in range(3)]
    assert "busy: 3 clips wait already" in site.post("/v1/jobs", *parts).error
    for each in made:
        assert site.get(f"{each.headers['location']}/result").status == 409
        assert site.ask("DELETE", each.headers["location"]).status == 204
    wait_until(lambda: not list(site.server.uploads.folder.iterdir()))


def test_of_two_files_the_broken_one_is_named(site: Site) -> None:
    good, broken = ("a.png", encoded(noise(1))), ("b.png", b"nothing")
    assert site.post("/v1/stylize", ("picture", broken), ("style", good)).error.startswith("the picture ")
    assert site.post("/v1/stylize", ("picture", good), ("style", broken)).error.startswith("the style ")


def test_what_is_no_clip_or_too_long_is_refused(site: Site, tmp_path: Path) -> None:
    style = ("style", ids(site)["dark"])
    for data in (b"nothing", encoded(noise(1))):
        refused = site.post("/v1/jobs", ("clip", ("a.mp4", data)), style)
        assert refused.error == "the clip is not one that can be read; send an .mp4, .webm or .mov"
    for limits, said in (
        (Limits(clip_frames=3), "the limit is 3"),
        (Limits(clip_px=99), "too large"),
    ):
        jobs = ClipJobs(site.server.stylizer, site.server.uploads, limits)
        source = make_clip(site.server.uploads.new(".mp4"))
        with pytest.raises(Exception, match=said):
            jobs.submit(source, Look(), site.server.library.encoded({style[1]: 1.0}))
        assert not source.exists()
        jobs.close()


def test_results_and_styles_are_deleted_after_a_time(
    stylizer: Stylizer, art: dict[str, Frame], tmp_path: Path
) -> None:
    now = [0.0]
    uploads, limits = Uploads(), Limits(keep_s=100)
    library = Library(stylizer, uploads, limits, lambda: now[0])
    own = library.add_own(art["dark"], "own")
    path = tmp_path / "a.png"
    path.write_bytes(encoded(art["light"]))
    with path.open("rb") as file:
        sent = library.add(file, "sent.png").id
    jobs = ClipJobs(stylizer, uploads, limits, lambda: now[0])
    job = jobs.submit(make_clip(uploads.new(".mp4")), Look(), library.encoded({own: 1.0}))
    wait_until(lambda: job.state == "done" and job.ended_s is not None)
    now[0] = 99.0
    library.get(sent)  # used again
    assert jobs.result(job.id).exists()
    now[0] = 101.0
    library.sweep()
    assert {own, sent} == {style.id for style in library.all()}
    with pytest.raises(Exception, match="no such job"):
        jobs.get(job.id)
    assert not job.sink.exists()
    now[0] = 300.0
    library.sweep()
    assert [own] == [style.id for style in library.all()]
    jobs.close()
    uploads.close()


def test_health_metrics_and_bundles(site: Site, stylizer: Stylizer) -> None:
    assert site.get("/v1/health").json["status"] == "ok"
    text = site.get("/v1/metrics").body.decode()
    lines = [line for line in text.splitlines() if not line.startswith("#")]
    assert all(re.fullmatch(r'[a-z_]+(\{state="[a-z]+"\})? \d+', line) for line in lines), text
    assert "std_rt_sessions 0" in lines
    found = site.get("/v1/bundles").json
    assert found["open"] == stylizer.bundle.name
    assert "std-tiny" in {each["name"] for each in found["bundles"]}
    assert site.get("/v1/info").json["steps"] == 2


def test_the_pages_and_their_files_ask_for_nothing_from_elsewhere(site: Site) -> None:
    for path in ("/", "/output", "/watch", "/static/page.css", "/static/page.js"):
        answer = site.get(path)
        assert answer.status == 200
        text = answer.body.decode().replace("http://www.w3.org/2000/svg", "")
        assert not re.search(r"https?://", text), path
        assert "default-src 'none'" in answer.headers["content-security-policy"]


def test_openapi_describes_every_route(site: Site) -> None:
    described = site.get("/v1/openapi.json").json
    assert described["openapi"].startswith("3.")
    app = site.server.app._app  # type: ignore[attr-defined]
    routes = {
        (route.path, method)
        for route in app.routes
        for method in getattr(route, "methods", None) or ()
        if route.path.startswith("/v1") and method != "HEAD"
    }
    listed = {(path, method.upper()) for path, found in described["paths"].items() for method in found}
    assert listed == routes
    schemas, bundle = described["components"]["schemas"], site.server.stylizer.bundle
    assert [schemas["Size"]["minimum"], schemas["Size"]["maximum"]] == list(bundle.size_range)
    assert schemas["Steps"]["enum"] == list(bundle.steps_allowed)
    assert schemas["StyleHere"]["examples"] == list(ids(site).values())
    assert described["security"] == []


def test_a_wrong_method_is_told_the_right_ones(site: Site) -> None:
    answer = site.ask("PUT", "/v1/styles")
    assert answer.status == 405
    assert set(answer.headers["allow"].split(", ")) == {"GET", "HEAD", "POST"}
