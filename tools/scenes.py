"""Photo-like scenes: a mountain lake, a still life, a city street and a cat."""

from __future__ import annotations

from collections.abc import Callable

import cv2
import numpy as np

from tools.canvas import (
    Array,
    Frame,
    blur,
    develop,
    dot,
    fbm,
    grid,
    hexes,
    mix,
    noise,
    normalize,
    ramp,
    smoothstep,
)
from tools.trace import Solid, ball, camera, ellipsoid, render_solids, round_cone, smooth_union

__all__ = ["SCENES", "cat", "lake", "still_life", "street"]


def lake(size_px: int = 512) -> Frame:
    """Snowy mountains behind a lake, low sun from the left."""
    rng = np.random.default_rng(11)
    x, y = grid(size_px)
    sun = np.array([-0.62, 0.34], np.float32)
    sky = _evening_sky(rng, x, y, sun)
    horizon = -0.18
    land, covered = _terrain(rng, size_px, horizon, normalize(np.array([-0.8, 0.45, -0.35])), sky)
    above = np.where(covered[..., None], land, sky)
    image = _water(rng, above, x, y, horizon, covered)
    return develop(_grain(rng, image), exposure=0.62)


def _evening_sky(rng: np.random.Generator, x: Array, y: Array, sun: Array) -> Array:
    colours = hexes("f7c98f", "f0b9a0", "a9b6cf", "5f86bd", "3d67a5")
    sky = ramp([-0.25, 0.0, 0.3, 0.65, 1.0], colours, y)
    away = np.hypot(x - sun[0], (y - sun[1]) * 1.1)
    sky += np.exp(-((away / 0.5) ** 2))[..., None] * hexes("ffb35c")[0] * 0.7
    sky += np.exp(-((away / 0.075) ** 4))[..., None] * np.array([6.0, 4.6, 2.6], np.float32)
    clouds = fbm(rng, (x.shape[0], x.shape[1]), 7, 6)
    stretched = 1.5 * blur(clouds, 1.5)
    cover = smoothstep(0.05, 0.5, stretched + 0.25 * y) * smoothstep(0.0, 0.4, y)
    lit = hexes("fff1dd")[0] * (1.15 - 0.5 * smoothstep(0.1, 0.8, stretched))[..., None]
    return mix(sky, lit + np.exp(-away * 2)[..., None] * hexes("ff9a4a")[0] * 0.6, 0.75 * cover)


def _terrain(
    rng: np.random.Generator, size_px: int, horizon: float, light: Array, sky: Array
) -> tuple[Array, Array]:
    """Colour of the land and where it is: rows of a height map from front to back, as voxel engines do."""
    cells = 768
    height = _heights(rng, cells)
    colour = _ground(rng, height, light)
    image, covered = np.zeros_like(sky), np.zeros(sky.shape[:2], bool)
    rows = np.linspace(1, -1, size_px, dtype=np.float32)[:, None]
    columns = np.linspace(-1, 1, size_px, dtype=np.float32)
    haze = hexes("aab4cc")[0]
    for step in range(520):
        far = (step / 520) ** 1.4
        depth = 1.0 + 5.0 * far
        row = np.full(size_px, far * (cells - 1), np.float32)
        column = (columns * depth / 6 * 0.48 + 0.5) * (cells - 1)
        top = horizon + _between(height, row, column) * 3.1 / depth
        new = (rows <= top[None]) & ~covered & (rows >= horizon)
        air = np.full(size_px, 0.62 * far**1.5, np.float32)
        image = np.where(new[..., None], mix(_between(colour, row, column), haze, air)[None], image)
        covered |= new
    return image, covered


def _heights(rng: np.random.Generator, cells: int) -> Array:
    """Height map [cells, cells], front row first: wooded hills, then ridges that rise to peaks."""
    size = (cells, cells)
    far = np.linspace(0, 1, cells, dtype=np.float32)[:, None]
    ridges = 1 - np.abs(fbm(rng, size, 6, 4, 0.4)) * 1.9
    peaks = np.clip(ridges, 0, None) ** 1.6 * (0.75 + 0.5 * noise(rng, size, 4))
    hills = 0.07 * (1 + noise(rng, size, 14)) * smoothstep(0.0, 0.25, far)
    rough = 0.045 * fbm(rng, size, 40, 4, 0.55)
    rise = smoothstep(0.25, 0.95, far)
    return (hills - 0.05 + rise * (1.15 * peaks + rough)).astype(np.float32)


def _between(values: Array, row: Array, column: Array) -> Array:
    """Values at fractional positions of a map, bilinear."""
    sampled = cv2.remap(values, column[None], row[None], cv2.INTER_LINEAR, borderMode=cv2.BORDER_REFLECT)
    return np.asarray(sampled[0])


def _ground(rng: np.random.Generator, height: Array, light: Array) -> Array:
    """Colour of the height map: forest, rock, and snow where it is high and flat enough, in sunlight."""
    dy, dx = np.gradient(height * 150)
    normal = normalize(np.stack([-dx, np.ones_like(dx), dy], -1))
    sun = np.clip(dot(normal, light.astype(np.float32)), 0, 1)
    size = (height.shape[0], height.shape[1])
    rock = hexes("6d6259")[0] * (1 + 0.35 * fbm(rng, size, 60, 4))[..., None]
    forest = hexes("2f4a2a")[0] * (1 + 0.6 * noise(rng, size, 200))[..., None]
    base = mix(forest, rock, smoothstep(0.16, 0.3, height + 0.08 * fbm(rng, size, 30)))
    base = mix(base, hexes("f2f4f8")[0], smoothstep(0.36, 0.5, height * (0.5 + 0.6 * normal[..., 1])))
    warm, cool = hexes("ffd9a8")[0] * 2.1, hexes("7f9cc9")[0] * 0.55
    return base * (sun[..., None] * warm + cool)


def _water(
    rng: np.random.Generator, above: Array, x: Array, y: Array, horizon: float, covered: Array
) -> Array:
    """The lower part: the picture above mirrored at the horizon, broken by ripples that grow towards us."""
    size = above.shape[0]
    near = np.clip((horizon - y) / (1 + horizon), 0, 1)
    ripple = noise(rng, (size, size), 26) + noise(rng, (size, size), 60)
    wave = np.sin(40 * np.log1p(14 * near) * 2 + 1.2 * ripple) * 0.012 * (0.3 + near)
    mirrored = 2 * horizon - y + wave * 2.2
    row = np.clip((1 - mirrored) / 2 * size, 0, size - 1).astype(int)
    column = np.clip((x + 1) / 2 * size + ripple * 1.2 * near, 0, size - 1).astype(int)
    water = (
        above[row, column] * (0.62 + 0.3 * (1 - near)[..., None]) + hexes("12384a")[0] * near[..., None] * 0.4
    )
    image = np.where((y < horizon)[..., None], water, above)
    shore = np.exp(-((np.abs(y - horizon) / 0.012) ** 2)) * 0.5
    return mix(image, hexes("4a4f4a")[0], shore)


def still_life(size_px: int = 512) -> Frame:
    """Fruit, a glazed vase and a brass ball on a wooden table by a window."""
    rng = np.random.default_rng(5)
    wood = _wood(rng)
    solids = [
        Solid(lambda p: p[:, 1], lambda p, n: _lookup(wood, p), gloss=0.25),
        Solid(_vase, _glaze, gloss=0.9),
        Solid(_apple, _apple_skin(rng), gloss=0.5),
        Solid(ball((-0.55, 0.34, -0.55), 0.34), _orange_skin, gloss=0.3, bump=0.012),
        Solid(
            ball((1.28, 0.26, -0.15), 0.26),
            lambda p, n: np.broadcast_to(hexes("d8a03c")[0], p.shape),
            mirror=0.75,
        ),
        Solid(_pear, _pear_skin(rng), gloss=0.35),
    ]
    ray = camera((0.0, 1.5, -4.4), (0.02, 0.62, 0.0), 0.36, size_px)
    light = normalize(np.array([-0.72, 0.85, -0.62]))
    image = render_solids(
        solids, ray, light, _studio, sun=hexes("ffe8c4")[0] * 2.6, ambient=hexes("8fa3bd")[0] * 0.55
    )
    return develop(_grain(rng, image), exposure=0.85)


def _studio(direction: Array) -> Array:
    """A plastered wall with light from a window on the left."""
    wall = ramp(
        [-0.2, 0.25, 0.9], hexes("4a4038", "8d8372", "6b6a66"), direction[:, 1] - 0.35 * direction[:, 0]
    )
    window = smoothstep(0.5, 0.62, -direction[:, 0]) * smoothstep(0.15, 0.25, direction[:, 1])
    return wall + window[:, None] * np.array([2.4, 2.3, 2.0], np.float32)


def _wood(rng: np.random.Generator) -> Array:
    """A plank texture [512, 512, 3]."""
    stretch = noise(rng, (512, 512), 3) * 5 + np.linspace(0, 34, 512)[:, None]
    rings = 0.5 + 0.5 * np.sin(stretch + fbm(rng, (512, 512), 8) * 2)
    fine = np.repeat(rng.normal(0, 0.12, (512, 64)).astype(np.float32), 8, 1)
    colour = mix(hexes("6e3f1f")[0], hexes("b3763f")[0], np.clip(rings * 0.8 + 0.1 + fine, 0, 1))
    return colour * np.where(np.arange(512) % 128 < 3, 0.35, 1.0)[:, None, None].astype(np.float32)


def _lookup(texture: Array, p: Array) -> Array:
    side = texture.shape[0]
    return texture[(p[:, 2] * 120).astype(int) % side, (p[:, 0] * 45 + 300).astype(int) % side]


def _vase(p: Array) -> Array:
    """A body of revolution: belly, neck and lip."""
    q = p - np.array([0.35, 0.0, 0.55], np.float32)
    around, up = np.hypot(q[:, 0], q[:, 2]), q[:, 1]
    radius = np.interp(up, [0.0, 0.1, 0.55, 0.95, 1.2, 1.42, 1.55], [0.24, 0.3, 0.55, 0.44, 0.2, 0.17, 0.26])
    side = (around - radius) * 0.62
    return np.maximum(side, np.maximum(up - 1.55, -up)).astype(np.float32)


def _glaze(p: Array, n: Array) -> Array:
    up, turn = p[:, 1], np.arctan2(p[:, 2] - 0.55, p[:, 0] - 0.35)
    blue, white = hexes("1d3f86")[0], hexes("e9ece8")[0]
    bands = ((up > 0.28) & (up < 0.34)) | ((up > 0.96) & (up < 1.02)) | (up > 1.48)
    petals = np.abs(np.sin(turn * 5)) * 0.22 > np.abs(up - 0.64)
    return np.where((bands | petals)[:, None], blue, white)


def _apple(p: Array) -> Array:
    q = p - np.array([0.18, 0.33, -0.75], np.float32)
    around = np.hypot(q[:, 0], q[:, 2])
    dimple = 0.12 * np.exp(-((around / 0.13) ** 2)) * (q[:, 1] > 0)
    fruit = np.sqrt(around**2 + (q[:, 1] * 1.06) ** 2) - 0.35 + dimple
    stem = np.maximum(
        np.hypot(q[:, 0] - 0.1 * (q[:, 1] - 0.2), q[:, 2]) - 0.02, np.abs(q[:, 1] - 0.34) - 0.12
    )
    return np.minimum(fruit * 0.8, stem).astype(np.float32)


def _apple_skin(rng: np.random.Generator) -> Callable[[Array, Array], Array]:
    streaks = fbm(rng, (64, 256), 40, 3)

    def skin(p: Array, n: Array) -> Array:
        q = p - np.array([0.18, 0.33, -0.75], np.float32)
        turn = ((np.arctan2(q[:, 2], q[:, 0]) / np.pi + 1) * 127).astype(int) % 256
        high = np.clip((q[:, 1] + 0.4) * 78, 0, 63).astype(int)
        red = mix(hexes("8e0f16")[0], hexes("d93a2b")[0], np.clip(0.5 + streaks[high, turn], 0, 1))
        ripe = mix(red, hexes("d9b44a")[0], smoothstep(0.1, 0.5, q[:, 1] + 0.6 * q[:, 0]))
        return np.where(
            (np.hypot(q[:, 0], q[:, 2]) < 0.05)[:, None] & (q[:, 1:2] > 0.22), hexes("3d2a17")[0], ripe
        )

    return skin


def _orange_skin(p: Array, n: Array) -> Array:
    return np.broadcast_to(hexes("e8791a")[0], p.shape)


def _pear(p: Array) -> Array:
    low = ball((-1.22, 0.36, 0.05), 0.36)(p)
    high = ball((-1.14, 0.86, 0.05), 0.17)(p)
    body = smooth_union(low, high, 0.34)
    stem = round_cone((-1.13, 1.02, 0.05), (-1.05, 1.24, 0.02), 0.022, 0.015)(p)
    return np.minimum(body * 0.9, stem)


def _pear_skin(rng: np.random.Generator) -> Callable[[Array, Array], Array]:
    spots = noise(rng, (256, 256), 90)

    def skin(p: Array, n: Array) -> Array:
        speck = spots[(p[:, 1] * 170).astype(int) % 256, (p[:, 0] * 170 + p[:, 2] * 90).astype(int) % 256]
        green = mix(hexes("a9b23a")[0], hexes("d7b648")[0], smoothstep(-1.5, -0.95, p[:, 0]))
        speckled = green * (1 - 0.28 * smoothstep(0.35, 0.6, speck))[:, None]
        return np.where(p[:, 1:2] > 1.03, hexes("3d2a17")[0], speckled)

    return skin


def street(size_px: int = 512) -> Frame:
    """A street in evening sun that runs to the horizon between facades."""
    rng = np.random.default_rng(23)
    x, y = grid(size_px)
    x, y = x - 0.06, y + 0.22
    image = _street_sky(rng, x, y)
    with np.errstate(divide="ignore"):
        ground_z = np.where(y < 0, -1.5 / np.minimum(y, -1e-4), np.inf)
        wall_z = 4.2 / np.maximum(np.abs(x), 1e-4)
    heights = rng.uniform(5.5, 11.5, (2, 24)).astype(np.float32)
    wall = _facades(rng, x, y, wall_z, heights)
    reach = np.where(x < 0, 0, 1), np.clip(wall_z / 7, 0, 23).astype(int)
    is_wall = (wall_z < ground_z) & (y * wall_z + 1.5 < heights[reach]) & (wall_z < 160)
    is_ground = (ground_z <= wall_z) & (ground_z < 160)
    image = np.where(is_wall[..., None], _aired(wall, wall_z), image)
    image = np.where(
        is_ground[..., None],
        _aired(_road(rng, x * np.minimum(ground_z, 200), np.minimum(ground_z, 200)), ground_z),
        image,
    )
    for side, z, colour in (
        (-1, 30.0, "2b4d7d"),
        (1, 21.0, "d9d4c8"),
        (-1, 15.0, "a3261f"),
        (1, 9.5, "3a3f45"),
    ):
        image = _car(image, x, y, side, z, hexes(colour)[0])
    for z in (46.0, 33.0, 23.0, 15.5, 10.2):
        image = _lamps(image, x, y, z)
    return develop(_grain(rng, image), exposure=0.9)


def _street_sky(rng: np.random.Generator, x: Array, y: Array) -> Array:
    sky = ramp([-0.1, 0.15, 0.5, 1.2], hexes("ffd39a", "f6c9a2", "9db9d6", "4f7fba"), y)
    clouds = smoothstep(0.05, 0.6, fbm(rng, (x.shape[0], x.shape[1]), 5, 6) + 0.2)
    sky = mix(sky, hexes("fff0e2")[0] * 1.1, 0.6 * clouds * smoothstep(0.1, 0.6, y))
    return sky + np.exp(-((np.hypot(x, y - 0.06) / 0.22) ** 2))[..., None] * np.array(
        [2.6, 1.7, 0.8], np.float32
    )


def _aired(colour: Array, z: Array) -> Array:
    """Golden air between us and things far away."""
    return mix(colour, hexes("f3c594")[0], 1 - np.exp(-np.minimum(z, 500) / 55))


def _facades(rng: np.random.Generator, x: Array, y: Array, z: Array, heights: Array) -> Array:
    """Both rows of houses: plaster in many colours, windows with frames and reflections, shop fronts."""
    side, house = np.where(x < 0, 0, 1), np.clip(z / 7, 0, 23).astype(int)
    plaster = hexes("c9875a", "d8b98a", "a8584a", "c8c2b2", "8f9a8a", "d9a05f", "b8735e", "9c8f85")
    colour = plaster[rng.integers(0, 8, (2, 24))][side, house]
    up = y * z + 1.5
    along = z % 7
    colour = colour * (1 + 0.08 * np.sin(up * 9) * (up < 3))[..., None]
    u, v = (along / 7 * 4) % 1, (up - 3.2) / 1.75 % 1
    upper = (up > 3.2) & (up < heights[side, house] - 0.7) & (along > 0.35)
    frame = upper & (np.abs(u - 0.5) < 0.31) & (np.abs(v - 0.48) < 0.37)
    glass = upper & (np.abs(u - 0.5) < 0.24) & (np.abs(v - 0.48) < 0.31) & (np.abs(u - 0.5) > 0.02)
    shine = 0.25 + 0.75 * np.clip(
        np.sin(house * 7.0 + np.floor(along / 7 * 4) * 3.1 + np.floor(up / 1.75) * 5.3), 0, 1
    )
    colour = np.where(frame[..., None], hexes("e8e0d0")[0], colour)
    colour = np.where(
        glass[..., None], mix(hexes("243040")[0], hexes("ffc98a")[0] * 1.3, shine * 0.6), colour
    )
    shop = (up < 2.6) & (up > 0.35) & (along > 0.6) & (along < 6.4)
    lit = mix(hexes("2a211c")[0], hexes("ffb45e")[0] * 1.4, smoothstep(0.0, 1.0, np.sin(along * 1.7 + house)))
    colour = np.where(shop[..., None], lit, colour)
    awning = (up >= 2.6) & (up < 3.05) & (along > 0.4) & (along < 6.6)
    stripes = mix(hexes("f1e9dc")[0], hexes("a8322c")[0], ((along * 2.2) % 1 < 0.5).astype(np.float32))
    colour = np.where((awning & (house % 2 == 0))[..., None], stripes, colour)
    cornice = np.abs(up - heights[side, house] + 0.4) < 0.18
    colour = np.where(cornice[..., None], colour * 1.25, colour)
    gap = smoothstep(0.0, 0.35, along)[..., None]
    sunlit = np.where(side == 0, 1.55, 0.62)[..., None] * np.where(
        side[..., None] == 0, hexes("ffdcb0")[0], hexes("b9c4dd")[0]
    )
    return colour * sunlit * (0.45 + 0.55 * gap)


def _road(rng: np.random.Generator, x: Array, z: Array) -> Array:
    """Asphalt with markings, kerbs and pavement; the right row of houses throws a shadow over half of it."""
    size = (x.shape[0], x.shape[1])
    fleck = noise(rng, size, size[0] / 2) * 0.06 + 0.05 * np.sin(x * 7 + np.sin(z * 0.7) * 2)
    colour = hexes("565458")[0] * (1 + fleck)[..., None]
    centre = (np.abs(x) < 0.07) & (z % 4 < 2.2)
    edge = np.abs(np.abs(x) - 2.55) < 0.05
    crossing = (np.abs(z - 7.4) < 0.9) & ((x * 1.15) % 1 < 0.5) & (np.abs(x) < 2.5)
    colour = np.where((centre | edge | crossing)[..., None], hexes("d9d5cc")[0], colour)
    slabs = 1 - 0.25 * (((x * 1.6) % 1 < 0.05) | ((z * 0.8) % 1 < 0.05))
    colour = np.where((np.abs(x) > 2.9)[..., None], hexes("a59a8c")[0] * slabs[..., None], colour)
    colour = np.where((np.abs(np.abs(x) - 2.85) < 0.1)[..., None], hexes("8a847b")[0], colour)
    shadow = smoothstep(-0.25, 0.25, x - 0.5 - 0.6 * np.sin(np.floor(z / 7) * 2.3))
    light = mix(hexes("ffd9a6")[0] * 1.5, hexes("8fa0c2")[0] * 0.6, shadow)
    return colour * light


def _car(image: Array, x: Array, y: Array, side: int, z: float, colour: Array) -> Array:
    """A car from behind at the kerb: body, cabin, window, lights, tyres and a shadow under it."""
    u, v = x * z - side * 1.75, y * z + 1.5
    body = (np.abs(u) < 0.86) & (v > 0.25) & (v < 0.92 - 0.06 * u**2)
    cabin = (np.abs(u) < 0.72 - 0.28 * (v - 0.9)) & (v >= 0.9) & (v < 1.45)
    glass = (np.abs(u) < 0.6 - 0.3 * (v - 0.9)) & (v > 0.98) & (v < 1.36)
    tyre = (np.abs(np.abs(u) - 0.66) < 0.14) & (v > 0.0) & (v < 0.34)
    lamp = (np.abs(np.abs(u) - 0.7) < 0.13) & (np.abs(v - 0.7) < 0.08)
    shade = (0.35 + 0.75 * smoothstep(0.2, 1.4, v) - side * 0.18 * u)[..., None]
    ground = np.exp(-((u / 1.0) ** 4)) * np.exp(-((v / 0.16) ** 2))
    image = mix(image, hexes("1a1a20")[0], 0.8 * ground)
    image = np.where((body | cabin)[..., None], colour * shade * 1.3, image)
    image = np.where(
        glass[..., None], mix(hexes("20262e")[0], hexes("ffd6a3")[0], smoothstep(1.0, 1.5, v) * 0.7), image
    )
    image = np.where(tyre[..., None], hexes("141416")[0], image)
    return np.where(lamp[..., None], np.array([1.6, 0.16, 0.08], np.float32), image)


def _lamps(image: Array, x: Array, y: Array, z: float) -> Array:
    for side in (-1, 1):
        u, v = x * z - side * 3.1, y * z + 1.5
        post = (np.abs(u) < 0.055) & (v > 0.2) & (v < 4.3)
        arm = (np.abs(v - 4.3) < 0.05) & (u * side < 0.05) & (u * side > -0.8)
        image = np.where((post | arm)[..., None], hexes("2a2b2e")[0], image)
        glow = np.exp(-(np.hypot(u + side * 0.75, v - 4.2) ** 2) / 0.05)
        image = image + glow[..., None] * np.array([2.2, 1.6, 0.9], np.float32)
    return image


def cat(size_px: int = 512) -> Frame:
    """A ginger cat looking at us, soft daylight, lights out of focus behind it."""
    rng = np.random.default_rng(8)
    fur = _fur(rng)
    solids = [
        Solid(_cat_body, lambda p, n: fur(p), gloss=0.05, bump=0.03),
        Solid(_cat_eyes, _iris, gloss=1.0),
        Solid(
            ellipsoid((0.0, 1.02, -0.83), (0.075, 0.05, 0.05)),
            lambda p, n: np.broadcast_to(hexes("b5605a")[0], p.shape),
            gloss=0.4,
        ),
    ]
    ray = camera((0.0, 1.3, -4.2), (0.0, 0.98, 0.0), 0.34, size_px)
    light = normalize(np.array([-0.6, 0.75, -0.75]))
    image = render_solids(
        solids, ray, light, _bokeh(rng), sun=hexes("fff0da")[0] * 1.9, ambient=hexes("a9b9c6")[0] * 0.75
    )
    return develop(_grain(rng, _whiskers(image)), exposure=0.95)


def _cat_body(p: Array) -> Array:
    q = p * np.array([1, 1, 1], np.float32)
    q[:, 0] = np.abs(q[:, 0])
    head = ellipsoid((0.0, 1.18, -0.12), (0.66, 0.56, 0.56))(q)
    head = smooth_union(head, ellipsoid((0.16, 0.96, -0.62), (0.21, 0.16, 0.17))(q), 0.12)
    head = smooth_union(head, ellipsoid((0.0, 0.86, -0.58), (0.15, 0.11, 0.14))(q), 0.1)
    head = smooth_union(head, ellipsoid((0.42, 1.0, -0.22), (0.32, 0.26, 0.3))(q), 0.2)
    ear = round_cone((0.4, 1.52, -0.1), (0.56, 2.02, -0.04), 0.23, 0.035)(q)
    hollow = round_cone((0.42, 1.58, -0.34), (0.555, 1.94, -0.2), 0.16, 0.02)(q)
    head = smooth_union(head, np.maximum(ear, -hollow), 0.1)
    chest = ellipsoid((0.0, -0.35, 0.3), (0.95, 1.2, 0.75))(q)
    return smooth_union(head, chest, 0.3)


def _cat_eyes(p: Array) -> Array:
    q = p.copy()
    q[:, 0] = np.abs(q[:, 0])
    return ellipsoid((0.25, 1.26, -0.58), (0.135, 0.125, 0.09))(q)


def _iris(p: Array, n: Array) -> Array:
    u, v = np.abs(p[:, 0]) - 0.25, p[:, 1] - 1.25
    pupil = smoothstep(1.0, 0.8, np.hypot(u / 0.045, v / 0.1))
    ring = ramp([0.0, 0.6, 1.0], hexes("c9d86a", "8fae3c", "2a3312"), np.hypot(u, v) / 0.125)
    return mix(ring, hexes("060606")[0], pupil)


def _fur(rng: np.random.Generator) -> Callable[[Array], Array]:
    """Ginger with darker stripes, white muzzle and chest."""
    strands = noise(rng, (512, 512), 200) * 0.6 + noise(rng, (512, 512), 60) * 0.4
    patch = fbm(rng, (512, 512), 6, 3)

    def colour(p: Array) -> Array:
        u, v = (
            (p[:, 0] * 120 + p[:, 2] * 50).astype(int) % 512,
            (p[:, 1] * 46 + p[:, 2] * 30).astype(int) % 512,
        )
        side, up = np.abs(p[:, 0]), p[:, 1]
        crown = np.sin(side * 26 + patch[v, u] * 2) * smoothstep(1.3, 1.5, up)
        cheek = np.sin(up * 20 + side * 6 + patch[v, u] * 2) * smoothstep(0.28, 0.5, side)
        stripe = smoothstep(0.25, 0.85, np.maximum(crown, cheek))
        ginger = mix(hexes("d58a3f")[0], hexes("8f4a1b")[0], stripe)
        white = smoothstep(0.34, 0.2, np.hypot(side * 0.9, (up - 0.9) * 1.1)) * (p[:, 2] < -0.3)
        bib = smoothstep(0.5, 0.3, side) * smoothstep(0.72, 0.55, up)
        coat = mix(ginger, hexes("f2eadd")[0], np.clip(white + bib, 0, 1))
        inner = smoothstep(1.62, 1.72, up) * (np.abs(side - 0.5) < 0.13) * (p[:, 2] < -0.12)
        coat = mix(coat, hexes("d9a094")[0], inner * 0.7)
        return coat * (1 + 0.3 * strands[v, u])[:, None]

    return colour


def _bokeh(rng: np.random.Generator) -> Callable[[Array], Array]:
    spots = rng.uniform((-0.45, -0.3, 0.02), (0.45, 0.5, 0.06), (46, 3))
    tints = hexes("ffd38a", "9fd0a0", "fff0c9", "7fb3c9", "e8a06a")[rng.integers(0, 5, 46)] * rng.uniform(
        0.1, 0.5, (46, 1)
    )

    def background(direction: Array) -> Array:
        colour = ramp([-0.4, 0.1, 0.5], hexes("2e3a2c", "4a6048", "6f8a78"), direction[:, 1])
        for (u, v, radius), tint in zip(spots, tints, strict=True):
            away = np.hypot(direction[:, 0] - u, direction[:, 1] - v)
            rim = 0.75 + 0.25 * smoothstep(0.5, 0.95, away / radius)
            colour = colour + (smoothstep(radius * 1.04, radius * 0.96, away) * rim)[:, None] * tint
        return colour.astype(np.float32)

    return background


def _whiskers(image: Array) -> Array:
    size = image.shape[0]
    over = np.zeros(image.shape[:2], np.float32)
    for side in (-1, 1):
        for k in range(4):
            t = np.linspace(0, 1, 20)
            px = (0.5 + side * (0.075 + 0.3 * t)) * size
            py = (0.515 + 0.018 * k - (0.05 - 0.034 * k) * t + 0.05 * t**2) * size
            line = np.stack([px, py], -1) * 16
            cv2.polylines(over, [line.astype(np.int32)], False, 1.0, max(1, size // 512), cv2.LINE_AA, 4)
    return mix(image, np.array([1.1, 1.08, 1.0], np.float32), over * 0.8)


def _grain(rng: np.random.Generator, image: Array) -> Array:
    """What a sensor and a lens add: a little noise and darker corners."""
    x, y = grid(image.shape[0])
    corner = 1 - 0.16 * (x**2 + y**2)
    grain = rng.normal(0, 0.012, image.shape[:2]).astype(np.float32)
    return image * (corner * (1 + grain))[..., None] + 0.002


SCENES: dict[str, Callable[[int], Frame]] = {
    "lake": lake,
    "still_life": still_life,
    "street": street,
    "cat": cat,
}
