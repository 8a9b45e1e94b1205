"""Style pictures in distinct media, painted by code."""

from __future__ import annotations

from collections.abc import Callable

import cv2
import numpy as np

from tools.canvas import (
    Array,
    Frame,
    blur,
    develop,
    fbm,
    grid,
    hexes,
    mix,
    noise,
    paint,
    paper,
    ramp,
    smoothstep,
)

__all__ = ["STYLES", "halftone", "ink", "stained_glass", "swirls", "watercolour", "wave"]

_SHIFT = 4  # OpenCV draws at 1/16 px


def _points(points: Array) -> Array:
    """Positions in px as OpenCV's fixed-point integers."""
    return np.round(np.asarray(points) * 2**_SHIFT).astype(np.int32)


def _line(image: Array, points: Array, colour: Array, width_px: float) -> None:
    shade = tuple(float(c) for c in np.atleast_1d(colour))
    cv2.polylines(image, [_points(points)], False, shade, max(1, round(width_px)), cv2.LINE_AA, _SHIFT)


def _fill(image: Array, points: Array, colour: Array) -> None:
    shade = tuple(float(c) for c in np.atleast_1d(colour))
    cv2.fillPoly(image, [_points(points)], shade, cv2.LINE_AA, _SHIFT)


def swirls(size_px: int = 512) -> Frame:
    """Oil: thick strokes in blue and gold that circle around stars over a dark hill."""
    rng = np.random.default_rng(31)
    stars = [
        (0.76, 0.2, 0.13),
        (0.2, 0.17, 0.07),
        (0.44, 0.1, 0.05),
        (0.5, 0.4, 0.1),
        (0.24, 0.46, 0.05),
        (0.9, 0.48, 0.05),
    ]
    colour, angle = _night(rng, stars)
    canvas = np.tile(hexes("14264f")[0], (size_px, size_px, 1))
    bristle = np.zeros((size_px, size_px), np.float32)
    for width, count, length in ((0.03, 1100, 7), (0.019, 2600, 8), (0.011, 4200, 7)):
        for _ in range(count):
            _stroke(rng, canvas, bristle, colour, angle, width * size_px, length)
    return develop(_relief(canvas, bristle), film=False)


def _night(rng: np.random.Generator, stars: list[tuple[float, float, float]]) -> tuple[Array, Array]:
    """Underpainting [256, 256, 3] and the direction of strokes [256, 256] in radians."""
    n = 256
    v, u = (np.mgrid[:n, :n].astype(np.float32) + 0.5) / n
    sky = ramp(
        [0, 0.35, 0.62, 0.8], hexes("0c1f5c", "1f4fae", "4f8fd0", "c9cf9a"), v + 0.3 * fbm(rng, (n, n), 5)
    )
    flow_x, flow_y = np.ones_like(u), 0.55 * np.sin(u * 7 + 2 * v)
    for x, y, r in stars:
        dx, dy = u - x, v - y
        near = np.exp(-((np.hypot(dx, dy) / (2.3 * r)) ** 2))
        flow_x, flow_y = flow_x + near * -dy / r * 4, flow_y + near * dx / r * 4
        rings = 0.5 + 0.5 * np.cos(np.hypot(dx, dy) / r * 5)
        halo = np.exp(-((np.hypot(dx, dy) / (1.25 * r)) ** 2))
        sky = mix(sky, hexes("ffbf1f")[0], np.clip(1.7 * halo * (0.45 + 0.55 * rings), 0, 1))
        sky = mix(sky, hexes("fff3b8")[0], np.exp(-((np.hypot(dx, dy) / (0.55 * r)) ** 4)))
    hill = v > 0.76 + 0.07 * np.sin(u * 6 + 1) + 0.03 * np.sin(u * 17)
    fields = ramp([-0.6, 0, 0.6], hexes("0e2a3a", "1f5a4d", "8fa03e"), fbm(rng, (n, n), 12, 3) * 1.6)
    tree = np.abs(u - 0.12 - 0.012 * np.sin(v * 30)) < 0.055 * smoothstep(0.28, 0.75, v)
    dark = ramp([-0.5, 0.5], hexes("0a1612", "2c4a24"), noise(rng, (n, n), 40))
    colour = np.where(hill[..., None], fields, sky)
    angle = np.arctan2(flow_y, flow_x)
    angle = np.where(hill, 0.35 * np.cos(u * 6 + 1), angle)
    return np.where(tree[..., None], dark, colour), np.where(tree, 1.35 + 0.5 * np.sin(v * 26), angle)


def _stroke(
    rng: np.random.Generator,
    canvas: Array,
    bristle: Array,
    colour: Array,
    angle: Array,
    width_px: float,
    length: int,
) -> None:
    """One stroke along the directions, in the colour of where it begins; ``bristle`` keeps its ridge."""
    size, cells = canvas.shape[0], angle.shape[0]
    at = rng.uniform(0, size, 2)
    cell = np.minimum((at / size * cells).astype(int), cells - 1)
    paint_ = colour[cell[1], cell[0]] * rng.uniform(0.72, 1.3) + rng.normal(0, 0.015, 3)
    path = [at]
    for _ in range(length):
        x, y = np.clip((path[-1] / size * cells).astype(int), 0, cells - 1)
        path.append(path[-1] + width_px * 0.55 * np.array([np.cos(angle[y, x]), np.sin(angle[y, x])]))
    points = np.array(path)
    _line(canvas, points, np.clip(paint_, 0, 1), width_px)
    _line(bristle, points, np.array([rng.uniform(0.2, 1.0)]), width_px)
    across = np.array([-(points[-1] - points[0])[1], (points[-1] - points[0])[0]])
    across = across / max(np.hypot(*across), 1e-6)
    for offset in (-0.27, 0.05, 0.3):
        _line(
            bristle,
            points + across * offset * width_px,
            np.array([rng.uniform(0, 1.2)]),
            max(width_px * 0.12, 1),
        )


def _relief(canvas: Array, height: Array) -> Array:
    """Light from the upper left over paint that stands up from the canvas."""
    soft = blur(height, 0.8)
    dy, dx = np.gradient(soft)
    return canvas * np.clip(1 + 0.9 * (dx + dy), 0.5, 1.7)[..., None]


def ink(size_px: int = 512) -> Frame:
    """Ink and brush on rice paper: misty hills, a pine branch, birds and a red seal."""
    rng = np.random.default_rng(7)
    sheet = paper(rng, size_px, "efe6d2", 0.03)
    _, y = grid(size_px)
    for level, base, height in ((0.35, 0.3, 0.6), (0.6, 0.02, 0.5), (0.95, -0.32, 0.4)):
        ridge = base + height * (noise(rng, (8, size_px), 5)[4] * 0.6 + 0.25 * fbm(rng, (8, size_px), 14)[4])
        edge = smoothstep(0.0, 0.012, ridge[None] - y)
        wash = np.exp(-np.clip(ridge[None] - y, 0, None) / 0.16) * (
            1 + 0.35 * fbm(rng, (size_px, size_px), 18)
        )
        paint(sheet, hexes("1c1d22")[0], np.clip(edge * wash * level, 0, 1))
    wet = np.zeros((size_px, size_px), np.float32)
    _branch(rng, wet, np.array([1.02, 0.2]) * size_px, np.pi * 0.93, 0.034 * size_px, 3)
    for _ in range(5):
        _bird(wet, rng.uniform((0.15, 0.1), (0.5, 0.3)) * size_px, rng.uniform(0.012, 0.026) * size_px)
    for _ in range(60):
        spot = rng.uniform(0, size_px, 2)
        cv2.circle(
            wet,
            tuple(spot.astype(int)),
            int(rng.exponential(size_px / 700)) + 1,
            float(rng.uniform(0.2, 0.8)),
            -1,
        )
    dry = 0.72 + 0.5 * noise(rng, (size_px, size_px), size_px / 3)
    paint(sheet, hexes("101014")[0], np.clip(blur(wet, size_px / 900) * dry, 0, 0.97))
    _seal(rng, sheet)
    return develop(sheet, film=False)


def _branch(
    rng: np.random.Generator, wet: Array, at: Array, heading: float, width_px: float, depth: int
) -> None:
    """A branch that bends, thins and forks; needles at the ends."""
    for _ in range(7):
        heading += rng.normal(0, 0.2)
        step = width_px * rng.uniform(1.2, 2.0) + 0.012 * wet.shape[0]
        ahead = at + step * np.array([np.cos(heading), np.sin(heading)])
        _line(
            wet, np.array([at, ahead]), np.array([rng.uniform(0.75, 1.0)]), width_px * rng.uniform(0.75, 1.15)
        )
        at, width_px = ahead, width_px * 0.9
        if depth and rng.random() < 0.42:
            fork = heading + rng.choice([-1, 1]) * rng.uniform(0.4, 0.9)
            _branch(rng, wet, at, fork, width_px * 0.62, depth - 1)
    _needles(rng, wet, at)


def _needles(rng: np.random.Generator, wet: Array, at: Array) -> None:
    size = wet.shape[0]
    for angle in rng.uniform(-np.pi * 1.1, 0.1 * np.pi, 18):
        reach = rng.uniform(0.03, 0.06) * size
        tip = at + reach * np.array([np.cos(angle), np.sin(angle)])
        _line(wet, np.array([at, tip]), np.array([rng.uniform(0.5, 0.95)]), size / 420)


def _bird(wet: Array, at: Array, span_px: float) -> None:
    t = np.linspace(-1, 1, 13)
    curve = np.stack([at[0] + t * span_px, at[1] - span_px * (0.7 * np.abs(t) ** 0.6 - 0.35 * t**2)], -1)
    _line(wet, curve, np.array([0.9]), max(1, span_px / 7))


def _seal(rng: np.random.Generator, sheet: Array) -> None:
    size = sheet.shape[0]
    x0, y0, side = int(0.09 * size), int(0.8 * size), int(0.085 * size)
    mark = np.ones((side, side), np.float32)
    for k in (0.3, 0.55, 0.78):
        cv2.line(
            mark,
            (int(0.18 * side), int(k * side)),
            (int(0.82 * side), int((k - 0.06) * side)),
            0.0,
            max(1, side // 12),
        )
    cv2.line(
        mark, (side // 2, int(0.14 * side)), (int(0.46 * side), int(0.88 * side)), 0.0, max(1, side // 11)
    )
    worn = mark * (noise(rng, (side, side), 16) > -0.55)
    paint(sheet[y0 : y0 + side, x0 : x0 + side], hexes("b3261c")[0], 0.9 * worn)


def stained_glass(size_px: int = 512) -> Frame:
    """Leaded glass: jewel colours around a rose, light from behind."""
    rng = np.random.default_rng(17)
    seeds, tints = _panes(rng)
    v, u = (np.mgrid[:size_px, :size_px].astype(np.float32) + 0.5) / size_px
    u, v = u + 0.006 * noise(rng, (size_px, size_px), 9), v + 0.006 * noise(rng, (size_px, size_px), 9)
    first, second, pane = (
        np.full(u.shape, 9.0, np.float32),
        np.full(u.shape, 9.0, np.float32),
        np.zeros(u.shape, int),
    )
    for number, (a, b) in enumerate(seeds):
        away = np.hypot(u - a, v - b)
        nearer = away < first
        second = np.where(nearer, first, np.minimum(second, away))
        first, pane = np.where(nearer, away, first), np.where(nearer, number, pane)
    texture = 1 + 0.2 * fbm(rng, u.shape, 10) + 0.1 * noise(rng, u.shape, 90)
    glow = 0.55 + 0.75 * np.exp(-((np.hypot(u - 0.5, v - 0.45) / 0.5) ** 2))
    glass = (
        tints[pane] * (texture * glow * (0.75 + 0.6 * smoothstep(0.0, 0.05, second - first)))[..., None] * 1.5
    )
    lead = smoothstep(0.0115, 0.0075, second - first)
    ridge = 0.05 + 0.2 * smoothstep(0.006, 0.0, np.abs(second - first - 0.004))
    image = mix(glass, ridge[..., None] * hexes("9aa0a8")[0], lead)
    return develop(image + 0.12 * blur(glass, size_px / 30), exposure=0.9)


def _panes(rng: np.random.Generator) -> tuple[Array, Array]:
    """Centres [N, 2] in 0..1 and colours [N, 3]: rings of petals, scattered panes around them."""
    seeds, tints = [(0.5, 0.45)], [hexes("ffd23f")[0]]
    rings = ((0.085, 6, "d7263d"), (0.165, 12, "f46036"), (0.245, 12, "8e1b5a"), (0.315, 18, "1f5fbf"))
    for radius, count, code in rings:
        for k in range(count):
            turn = 2 * np.pi * (k + 0.5 * (count == 12)) / count
            seeds.append((0.5 + radius * np.cos(turn), 0.45 + radius * np.sin(turn)))
            tints.append(hexes(code)[0] * rng.uniform(0.7, 1.25))
    outer = hexes("0b4f8a", "12807a", "2a9d4a", "173f8f", "5b2a86", "0e6ba8")
    while len(seeds) < 150:
        spot = rng.uniform(-0.05, 1.05, 2)
        if (
            np.hypot(spot[0] - 0.5, spot[1] - 0.45) > 0.36
            and min(np.hypot(*(spot - s)) for s in np.array(seeds)) > 0.06
        ):
            seeds.append((float(spot[0]), float(spot[1])))
            tints.append(outer[rng.integers(0, 6)] * rng.uniform(0.7, 1.3))
    return np.array(seeds, np.float32), np.array(tints, np.float32)


def wave(size_px: int = 512) -> Frame:
    """Woodblock print: a great wave with claws of foam, a far snowy cone; flat inks, outlines."""
    rng = np.random.default_rng(3)
    v = (np.mgrid[:size_px, :size_px][0].astype(np.float32) + 0.5) / size_px
    image = ramp([0, 0.3, 0.75], hexes("b9b39a", "e3d3a8", "efe2bd"), v).copy()
    _cone(image)
    sea, mid, pale, line = hexes("1d3f6e", "3f6f9f", "a9c4cf", "10203f")
    for base, swell, shade in ((0.70, 0.025, mid), (0.77, 0.035, sea)):
        crest = base + swell * np.sin(np.linspace(0, 9, 80) + base * 20)
        _ink_fill(image, _below(crest), shade, line)
    body = _wave_body()
    _ink_fill(image, body, sea, line)
    ribs = image.copy()
    for k in range(1, 9):
        rib = body[:60] * (1 - 0.08 * k) + np.array([0.06, 0.125]) * k * 0.62
        _line(ribs, rib[: 60 - 2 * k] * size_px, pale if k % 2 else mid, size_px * (0.018 - 0.001 * k))
    within = np.zeros((size_px, size_px), np.float32)
    _fill(within, (body * 0.985 + 0.004) * size_px, np.ones(1))
    paint(image, ribs, within)
    _foam(rng, image, body[16:61], line)
    for base in (0.87, 0.94):
        crest = base + 0.03 * np.sin(np.linspace(0, 11, 80) + base * 31)
        _ink_fill(image, _below(crest), mid if base < 0.9 else sea, line)
        _line(image, np.stack([np.linspace(0, 1, 80), crest + 0.014], -1) * size_px, pale, size_px * 0.008)
    grain = (
        1
        + 0.05 * np.sin(v * 300 + 5 * noise(rng, (size_px, size_px), 5))
        + 0.05 * noise(rng, (size_px, size_px), size_px / 2)
    )
    return develop(image * grain[..., None], film=False)


def _below(crest: Array) -> Array:
    """The area under a crest line, in 0..1."""
    across = np.linspace(-0.02, 1.02, len(crest))
    return np.concatenate([np.stack([across, crest], -1), [[1.02, 1.02], [-0.02, 1.02]]])


def _ink_fill(image: Array, shape: Array, colour: Array, line: Array) -> None:
    size = image.shape[0]
    _fill(image, shape * size, colour)
    _line(image, np.concatenate([shape, shape[:1]]) * size, line, size * 0.007)


def _cone(image: Array) -> None:
    foot, top = 0.74, 0.47
    t = np.linspace(0, 1, 30)
    left = np.stack([0.52 + 0.15 * t, foot - (foot - top) * t**1.7], -1)
    right = np.stack([0.71 + 0.16 * t, top + (foot - top) * (1 - (1 - t) ** 1.7)], -1)
    _ink_fill(image, np.concatenate([left, right]), hexes("5b7391")[0], hexes("10203f")[0])
    snow = np.concatenate(
        [left[22:], right[:9], [[0.745, 0.575], [0.72, 0.555], [0.69, 0.6], [0.67, 0.56], [0.645, 0.59]]]
    )
    _fill(image, snow * image.shape[0], hexes("f3ecd8")[0])


def _wave_body() -> Array:
    """Outline in 0..1: up the back, over the curl, down the hollow. The first 60 points are back and curl."""
    keys = [
        (-0.05, 0.62),
        (0.03, 0.45),
        (0.1, 0.27),
        (0.22, 0.14),
        (0.38, 0.1),
        (0.5, 0.16),
        (0.57, 0.27),
        (0.58, 0.36),
    ]
    keys += [(0.5, 0.3), (0.42, 0.28), (0.34, 0.33), (0.3, 0.45), (0.34, 0.6), (0.46, 0.72), (0.62, 0.78)]
    keys_ = np.array(keys)
    t = np.arange(len(keys_))
    fine = np.linspace(0, len(keys_) - 1, 120)
    curve = np.stack([np.interp(fine, t, keys_[:, c]) for c in (0, 1)], -1)
    smooth = np.stack(
        [np.convolve(np.pad(curve[:, c], 5, "edge"), np.ones(11) / 11, "valid") for c in (0, 1)], -1
    )
    return np.concatenate([smooth, [[0.62, 1.02], [-0.05, 1.02]]])


def _foam(rng: np.random.Generator, image: Array, crest: Array, line: Array) -> None:
    """White claws along the crest, puffs over their roots, and drops in the air."""
    white = hexes("f6f0df")[0]
    along = np.gradient(crest, axis=0)
    outward = np.stack([along[:, 1], -along[:, 0]], -1) / np.maximum(np.hypot(*along.T), 1e-6)[:, None]
    for at, out in zip(crest[6::3], outward[6::3], strict=True):
        tip = at + out * rng.uniform(0.03, 0.06) + np.array([0.045, 0.05])
        side = np.array([-out[1], out[0]]) * 0.022
        _ink_fill(image, np.array([at - side, at + side, tip]), white, line)
    middles = np.repeat(crest, 3, 0) + np.repeat(outward, 3, 0) * rng.uniform(
        -0.03, 0.014, (3 * len(crest), 1)
    )
    radii = rng.uniform(0.012, 0.026, len(middles))
    for grow, colour in ((0.006, line), (0.0, white)):
        for middle, radius in zip(middles, radii, strict=True):
            _disc(image, middle, radius + grow, colour)
    for middle, radius in zip(middles[::2], radii[::2], strict=True):
        _disc(image, middle + 0.008, radius * 0.35, hexes("a9c4cf")[0])
    for _ in range(46):
        _disc(image, rng.uniform((0.4, 0.06), (0.86, 0.52)), rng.uniform(0.002, 0.006), white)


def _disc(image: Array, centre: Array, radius: float, colour: Array) -> None:
    """A filled circle; centre and radius in 0..1."""
    size = image.shape[0]
    x, y = (int(c) for c in _points(np.asarray(centre) * size))
    cv2.circle(image, (x, y), int(radius * size * 2**_SHIFT), colour.tolist(), -1, cv2.LINE_AA, _SHIFT)


def watercolour(size_px: int = 512) -> Frame:
    """Watercolour: poppies and leaves in wet washes with dark rims and granulation on cold-pressed paper."""
    rng = np.random.default_rng(41)
    sheet = paper(rng, size_px, "f7f3ea", 0.035)
    granules = fbm(rng, (size_px, size_px), size_px / 6, 3)
    sky = smoothstep(
        0.1, 0.9, fbm(rng, (size_px, size_px), 3, 5) + 0.55 - np.linspace(0, 0.9, size_px)[:, None]
    )
    _glaze(sheet, hexes("8fb9cf")[0], sky * 0.75, granules)
    for _ in range(26):
        stem = rng.uniform((0.05, 0.55), (0.95, 0.95))
        _wash(
            rng,
            sheet,
            granules,
            stem,
            (0.02, 0.17),
            hexes("5f8a3c", "33663f", "8fa653")[rng.integers(0, 3)],
            0.6,
        )
    flowers = rng.uniform((0.12, 0.22), (0.88, 0.66), (9, 2))
    for at in flowers[np.argsort(flowers[:, 1])]:
        shade = hexes("d8332f", "e8613a", "c9244f", "f08a3c")[rng.integers(0, 4)]
        for turn in rng.uniform(0, 2 * np.pi, 4):
            petal = at + 0.045 * np.array([np.cos(turn), np.sin(turn) * 0.7])
            _wash(rng, sheet, granules, petal, (0.075, 0.065), shade, 0.8)
        _wash(rng, sheet, granules, at, (0.022, 0.02), hexes("2a1a2e")[0], 0.95)
    _splashes(rng, sheet, granules)
    return develop(sheet, film=False)


def _glaze(sheet: Array, colour: Array, cover: Array, granules: Array) -> None:
    """A transparent wash: pigment multiplies the light of the sheet and settles in the tooth of the paper."""
    pigment = np.clip(cover * (1 + 0.28 * granules), 0, 1)[..., None]
    sheet *= 1 - pigment + pigment * np.maximum(colour, 0.004)


def _wash(
    rng: np.random.Generator,
    sheet: Array,
    granules: Array,
    at: Array,
    radii: tuple[float, float],
    colour: Array,
    strength: float,
) -> None:
    """A puddle that dries: ragged outline, pale inside, dark rim."""
    size = sheet.shape[0]
    u, v = np.meshgrid(np.arange(size) / size - at[0], np.arange(size) / size - at[1])
    ragged = 0.32 * fbm(rng, (size, size), 9, 4)
    level = 1 - np.hypot(u / radii[0], v / radii[1]) + ragged
    inside = smoothstep(0.0, 0.06, level)
    rim = np.exp(-((level - 0.05) ** 2) / 0.004)
    bloom = 0.55 + 0.45 * fbm(rng, (size, size), 6, 3)
    _glaze(sheet, colour, inside * strength * (bloom + 0.75 * rim), granules)


def _splashes(rng: np.random.Generator, sheet: Array, granules: Array) -> None:
    size = sheet.shape[0]
    spots = np.zeros((size, size), np.float32)
    for _ in range(90):
        at = tuple(int(c) for c in rng.uniform(0, size, 2))
        cv2.circle(
            spots, at, int(rng.exponential(size / 220)) + 1, float(rng.uniform(0.2, 0.7)), -1, cv2.LINE_AA
        )
    _glaze(sheet, hexes("d8433a")[0], spots * 0.6, granules)


def halftone(size_px: int = 512) -> Frame:
    """Comic print: rays, a burst, clouds with dots in three inks and thick black contours."""
    v, u = (np.mgrid[:size_px, :size_px].astype(np.float32) + 0.5) / size_px
    rng = np.random.default_rng(2)
    turn, away = np.arctan2(v - 0.52, u - 0.5), np.hypot(u - 0.5, v - 0.52)
    image = np.tile(hexes("fff6df")[0], (size_px, size_px, 1))
    rays = (np.sin(turn * 16) > 0).astype(np.float32)
    paint(image, hexes("1fa3d8")[0], rays * _dots(u, v, 0.3, 0.0185, 0.25 + 0.85 * away))
    paint(image, hexes("1fa3d8")[0], (1 - rays) * _dots(u, v, 0.3, 0.0185, 0.95 - 0.6 * away))
    for reach, spikes, code, seed in (
        (0.42, 15, "e5262b", 0.0),
        (0.33, 13, "ffd400", 0.9),
        (0.19, 9, "fff6df", 0.4),
    ):
        shape = _burst(rng, reach, spikes, seed)
        _fill(image, shape * size_px, hexes(code)[0])
        _line(image, np.concatenate([shape, shape[:2]]) * size_px, hexes("0d0d12")[0], size_px * 0.013)
    inner = np.zeros((size_px, size_px), np.float32)
    _fill(inner, _burst(np.random.default_rng(9), 0.27, 13, 0.9) * size_px, np.ones(1))
    paint(image, hexes("e5262b")[0], inner * _dots(u, v, 0.9, 0.017, 0.25 + 1.6 * (v - 0.45)) * (away > 0.19))
    _clouds(rng, image, u, v)
    misprint = 1 + 0.03 * noise(rng, (size_px, size_px), size_px / 2)
    return develop(image * misprint[..., None], film=False)


def _dots(u: Array, v: Array, angle: float, pitch: float, tone: Array) -> Array:
    """A screen of dots [H, W] that covers the share ``tone`` in 0..1."""
    a = (u * np.cos(angle) - v * np.sin(angle)) / pitch
    b = (u * np.sin(angle) + v * np.cos(angle)) / pitch
    centre = np.hypot(a - np.round(a), b - np.round(b))
    radius = np.sqrt(np.clip(tone, 0, 1) / np.pi) * 1.05
    return smoothstep(0.06, -0.06, centre - radius)


def _burst(rng: np.random.Generator, reach: float, spikes: int, turn: float) -> Array:
    angles = np.linspace(0, 2 * np.pi, spikes * 2, endpoint=False) + turn
    lengths = np.where(np.arange(spikes * 2) % 2 == 0, reach, reach * 0.62) * rng.uniform(
        0.86, 1.12, spikes * 2
    )
    return np.stack([0.5 + lengths * np.cos(angles), 0.52 + lengths * np.sin(angles) * 0.92], -1)


def _clouds(rng: np.random.Generator, image: Array, u: Array, v: Array) -> None:
    """Puffs along the bottom: white with a dotted shade and a contour."""
    size = image.shape[0]
    shade = np.zeros((size, size), np.float32)
    puffs = [(x, 0.95 + rng.uniform(-0.03, 0.04), rng.uniform(0.085, 0.13)) for x in np.linspace(0, 1, 9)]
    for grow, colour in ((0.013, hexes("0d0d12")[0]), (0.0, hexes("ffffff")[0])):
        for x, y, r in puffs:
            cv2.circle(
                image,
                (int(x * size), int(y * size)),
                int((r + grow) * size),
                colour.tolist(),
                -1,
                cv2.LINE_AA,
            )
    for x, y, r in puffs:
        cv2.circle(
            shade, (int((x + 0.02) * size), int((y + 0.05) * size)), int(r * 0.9 * size), 1.0, -1, cv2.LINE_AA
        )
    paint(image, hexes("f28bb0")[0], shade * _dots(u, v, 0.6, 0.016, 0.5 + 1.5 * (v - 0.93)))


STYLES: dict[str, Callable[[int], Frame]] = {
    "swirls": swirls,
    "ink": ink,
    "stained_glass": stained_glass,
    "wave": wave,
    "watercolour": watercolour,
    "halftone": halftone,
}
