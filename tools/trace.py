"""A small ray marcher over signed distance fields: soft shadows, occlusion, gloss, one mirror bounce."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from tools.canvas import Array, dot, grid, normalize

Distance = Callable[[Array], Array]  # points [N, 3] -> distance [N]
_FAR = 14.0


@dataclass(frozen=True)
class Solid:
    """``colour(points, normals)`` [N, 3] is its albedo; ``gloss``, ``mirror`` in [0, 1]."""

    distance: Distance
    colour: Callable[[Array, Array], Array]
    gloss: float = 0.0
    mirror: float = 0.0
    bump: float = 0.0


@dataclass(frozen=True)
class Ray:
    """``origin`` [3], ``direction`` [S * S, 3]."""

    origin: Array
    direction: Array
    size_px: int


def camera(eye: tuple[float, ...], target: tuple[float, ...], spread: float, size_px: int) -> Ray:
    """Rays of a pinhole camera; ``spread`` is the tangent of half its angle of view."""
    origin = np.array(eye, np.float32)
    forward = normalize(np.array(target, np.float32) - origin)
    right = normalize(np.cross(np.array([0, 1, 0], np.float32), forward))
    up = np.cross(forward, right)
    x, y = grid(size_px)
    direction = forward + spread * (x[..., None] * right + y[..., None] * up)
    return Ray(origin, normalize(direction.reshape(-1, 3)).astype(np.float32), size_px)


def ball(centre: tuple[float, ...], radius: float) -> Distance:
    """A sphere."""
    at = np.array(centre, np.float32)
    return lambda p: np.linalg.norm(p - at, axis=1) - radius


def ellipsoid(centre: tuple[float, ...], radii: tuple[float, ...]) -> Distance:
    """An ellipsoid along the axes (the distance is a bound, exact on the surface)."""
    at, r = np.array(centre, np.float32), np.array(radii, np.float32)

    def distance(p: Array) -> Array:
        q = (p - at) / r
        k0, k1 = np.linalg.norm(q, axis=1), np.linalg.norm(q / r, axis=1)
        return k0 * (k0 - 1) / np.maximum(k1, 1e-6)

    return distance


def round_cone(a: tuple[float, ...], b: tuple[float, ...], ra: float, rb: float) -> Distance:
    """A capsule from ``a`` to ``b`` whose radius goes from ``ra`` to ``rb``."""
    start, along = np.array(a, np.float32), np.array(b, np.float32) - np.array(a, np.float32)

    def distance(p: Array) -> Array:
        q = p - start
        t = np.clip(q @ along / (along @ along), 0, 1)
        return (np.linalg.norm(q - t[:, None] * along, axis=1) - (ra + (rb - ra) * t)) * 0.9

    return distance


def smooth_union(a: Array, b: Array, width: float) -> Array:
    """The nearer of two distances, with a seam melted over ``width``."""
    h = np.clip(0.5 + 0.5 * (b - a) / width, 0, 1)
    return b * (1 - h) + a * h - width * h * (1 - h)


def render_solids(
    solids: list[Solid], ray: Ray, light: Array, sky: Callable[[Array], Array], sun: Array, ambient: Array
) -> Array:
    """Linear picture [S, S, 3]. ``light`` points to the sun; ``sky(directions)`` colours what is missed."""
    scene = _Scene(solids, light.astype(np.float32), sky, sun, ambient)
    origin = np.broadcast_to(ray.origin, ray.direction.shape)
    colour = scene.see(origin, ray.direction, bounces=1)
    return colour.reshape(ray.size_px, ray.size_px, 3)


class _Scene:
    def __init__(
        self, solids: list[Solid], light: Array, sky: Callable[[Array], Array], sun: Array, ambient: Array
    ) -> None:
        self._solids, self._light, self._sky, self._sun, self._ambient = solids, light, sky, sun, ambient

    def see(self, origin: Array, direction: Array, bounces: int) -> Array:
        """Colours [N, 3] along rays."""
        colour = self._sky(direction).astype(np.float32)
        depth = self._march(origin, direction)
        hit = np.flatnonzero(depth < _FAR)
        points = origin[hit] + depth[hit, None] * direction[hit]
        which = np.argmin([solid.distance(points) for solid in self._solids], 0)
        for number, solid in enumerate(self._solids):
            mine = which == number
            if mine.any():
                colour[hit[mine]] = self._shade(solid, points[mine], direction[hit[mine]], bounces)
        fade = np.clip((depth[hit] - 7) / (_FAR - 7), 0, 1)[:, None]
        colour[hit] = colour[hit] * (1 - fade) + self._sky(direction[hit]) * fade
        return colour

    def _distance(self, p: Array) -> Array:
        nearest = self._solids[0].distance(p)
        for solid in self._solids[1:]:
            nearest = np.minimum(nearest, solid.distance(p))
        return nearest

    def _march(self, origin: Array, direction: Array) -> Array:
        """Distance along each ray [N] to the first surface, or more than the far end."""
        depth = np.full(len(direction), 0.02, np.float32)
        active = np.arange(len(direction))
        for _ in range(90):
            step = self._distance(origin[active] + depth[active, None] * direction[active])
            depth[active] += step
            active = active[(step > 0.0015) & (depth[active] < _FAR)]
            if not len(active):
                break
        depth[active] = np.where(depth[active] > 6, _FAR + 1, depth[active])
        return depth

    def _shade(self, solid: Solid, p: Array, direction: Array, bounces: int) -> Array:
        n = self._normal(solid, p)
        lift = p + n * 0.01
        lit = np.clip(dot(n, self._light), 0, 1) * self._shadow(lift)
        occlusion = self._occlusion(p, n)
        sky = 0.55 + 0.45 * n[:, 1]
        albedo = solid.colour(p, n)
        colour = albedo * (lit[:, None] * self._sun + (occlusion * sky)[:, None] * self._ambient)
        half = normalize(self._light - direction)
        shine = solid.gloss * np.clip(dot(n, half), 0, 1) ** 60 * lit * 1.6
        colour = colour + shine[:, None] * self._sun
        mirror = solid.mirror + solid.gloss * 0.35 * (1 - np.abs(dot(n, direction))) ** 4
        if bounces and mirror.max() > 0.02:
            away = direction - 2 * dot(n, direction)[:, None] * n
            seen = self.see(lift, away.astype(np.float32), bounces - 1)
            tint = albedo * 1.3 if solid.mirror else np.ones_like(albedo)
            colour = colour * (1 - mirror[:, None]) + seen * tint * mirror[:, None]
        return colour

    def _normal(self, solid: Solid, p: Array) -> Array:
        step = 0.004
        axes = np.eye(3, dtype=np.float32) * step
        n = normalize(np.stack([solid.distance(p + a) - solid.distance(p - a) for a in axes], -1))
        if solid.bump:
            wave = np.sin(p * 61 + 2 * np.sin(p[:, [1, 2, 0]] * 43)) * np.sin(p[:, [2, 0, 1]] * 79)
            n = normalize(n + solid.bump * 9 * wave)
        return n.astype(np.float32)

    def _shadow(self, p: Array) -> Array:
        """Share of the sun [N] that reaches each point, soft at the rim."""
        share, depth = np.ones(len(p), np.float32), np.full(len(p), 0.03, np.float32)
        active = np.arange(len(p))
        for _ in range(40):
            step = self._distance(p[active] + depth[active, None] * self._light)
            share[active] = np.minimum(share[active], np.clip(10 * step / depth[active], 0, 1))
            depth[active] += np.clip(step, 0.02, 0.4)
            active = active[(share[active] > 0.01) & (depth[active] < 5)]
            if not len(active):
                break
        return share

    def _occlusion(self, p: Array, n: Array) -> Array:
        """Share of the sky [N] that each point sees, from a few samples along the normal."""
        hidden = np.zeros(len(p), np.float32)
        for reach, weight in ((0.06, 1.0), (0.16, 0.7), (0.36, 0.45)):
            hidden += weight * np.clip(reach - self._distance(p + n * reach), 0, None) / reach
        return np.clip(1 - 0.5 * hidden, 0.08, 1)
