"""Generated styles: exact (photo, style, stylized photo) triples at no cost.

A style is drawn once (``draw_style``) with its palette and parameters and can then be applied to any
number of pictures, so two different photos in one style give the training a style picture that shares
palette, stroke and medium with the target, and no content. All pictures are uint8 ``[H, W, 3]`` RGB.
"""

from __future__ import annotations

from collections.abc import Callable

import cv2
import numpy as np

from std_rt.training.data.picture_set import Frame, Image

Style = Callable[[Frame, np.random.Generator], Frame]

_LUMA = np.array([0.299, 0.587, 0.114], np.float32)


def _luma(x: Image) -> Image:
    return x @ _LUMA


def _to_frame(x: Image) -> Frame:
    return (np.clip(x, 0, 1) * 255 + 0.5).astype(np.uint8)


def random_palette(rng: np.random.Generator, n: int) -> Image:
    """``[n, 3]`` colours from dark to light around one to three hues."""
    hues = rng.uniform(0, 1) + rng.choice([0.0, 0.08, 0.33, 0.5, 0.6], size=n) * rng.choice([-1, 1])
    value = np.sort(np.clip(np.linspace(0.08, 0.97, n) + rng.normal(0, 0.08, n), 0, 1))
    saturation = np.clip(rng.normal(rng.uniform(0.1, 0.85), 0.18, n), 0, 1)
    hsv = np.stack([(hues % 1) * 360, saturation, value], -1).astype(np.float32)
    rgb = cv2.cvtColor(hsv[None], cv2.COLOR_HSV2RGB)[0]
    return rgb[np.argsort(rgb @ _LUMA)]


def palette_of(picture: Frame, rng: np.random.Generator, n: int) -> Image:
    """``[n, 3]`` colours of a picture by k-means, dark to light."""
    small = cv2.resize(picture, (48, 48), interpolation=cv2.INTER_AREA).reshape(-1, 3)
    cv2.setRNGSeed(int(rng.integers(2**31 - 1)))
    stop = (cv2.TERM_CRITERIA_MAX_ITER, 8, 1.0)
    labels = np.zeros((len(small), 1), np.int32)  # an output; the stubs allow no None
    _, _, centres = cv2.kmeans(small.astype(np.float32), n, labels, stop, 1, cv2.KMEANS_PP_CENTERS)
    rgb = centres.astype(np.float32) / 255
    return rgb[np.argsort(rgb @ _LUMA)]


def _colour_map(palette: Image, rng: np.random.Generator) -> Callable[[Image], Image]:
    """A map of colours to the palette: a ramp over lightness, mixed with some of the original hue."""
    keep = float(rng.choice([0.0, 0.0, 0.25, 0.5]))
    stops = np.linspace(0.02, 0.98, len(palette))
    gain = rng.uniform(0.8, 1.3)

    def apply(x: Image) -> Image:
        light = np.clip((_luma(x) - 0.5) * gain + 0.5, 0, 1)
        ramp = np.stack([np.interp(light, stops, palette[:, c]) for c in range(3)], -1)
        chroma = x - _luma(x)[..., None]
        return np.clip(ramp + keep * chroma, 0, 1).astype(np.float32)

    return apply


def _smooth(x: Image, strength: int) -> Image:
    for _ in range(strength):
        x = cv2.bilateralFilter(x, 7, 0.12, 5)
    return x


def _edges(x: Image, sigma: float, tau: float, sharp: float) -> Image:
    """Line drawing ``[H, W]`` (1 = paper, 0 = ink) by an extended difference of Gaussians."""
    g = _luma(x)
    d = cv2.GaussianBlur(g, (0, 0), sigma) - tau * cv2.GaussianBlur(g, (0, 0), sigma * 1.6)
    return np.where(d > 0, 1.0, 1.0 + np.tanh(sharp * d)).astype(np.float32)


def _grid(shape: tuple[int, ...], angle: float) -> tuple[Image, Image]:
    y, x = np.mgrid[: shape[0], : shape[1]].astype(np.float32)
    c, s = np.float32(np.cos(angle)), np.float32(np.sin(angle))
    return x * c + y * s, y * c - x * s


def _noise(shape: tuple[int, ...], scale: float, rng: np.random.Generator) -> Image:
    """Smooth noise ``[H, W]`` of unit variance whose grain is ``scale`` px."""
    small = rng.standard_normal((int(shape[0] / scale) + 2, int(shape[1] / scale) + 2)).astype(np.float32)
    return cv2.resize(small, (shape[1], shape[0]), interpolation=cv2.INTER_CUBIC)


def _cells(
    shape: tuple[int, ...], size: float, jitter: float, rng: np.random.Generator
) -> tuple[Image, Image]:
    """Voronoi cells of a jittered grid: label ``[H, W]`` and distance to the border between cells."""
    ys, xs = np.mgrid[size / 2 : shape[0] : size, size / 2 : shape[1] : size]
    points = np.stack([ys.ravel(), xs.ravel()], -1) + rng.uniform(-jitter, jitter, (ys.size, 2)) * size
    seeds = np.full(shape[:2], 255, np.uint8)
    at = np.clip(points.round().astype(int), 0, np.array(shape[:2]) - 1)
    seeds[at[:, 0], at[:, 1]] = 0
    _, labels = cv2.distanceTransformWithLabels(seeds, cv2.DIST_L2, 5, labelType=cv2.DIST_LABEL_PIXEL)
    border = cv2.morphologyEx(labels.astype(np.float32), cv2.MORPH_GRADIENT, np.ones((2, 2))) > 0
    distance = cv2.distanceTransform((~border).astype(np.uint8), cv2.DIST_L2, 3)
    return labels, distance.astype(np.float32)


def _mean_per_label(x: Image, labels: Image) -> Image:
    flat = labels.ravel().astype(np.int64)
    count = np.maximum(np.bincount(flat), 1)
    means = np.stack([np.bincount(flat, x[..., c].ravel()) / count for c in range(3)], -1)
    return means[flat].reshape(x.shape).astype(np.float32)


def _flat(palette: Image, rng: np.random.Generator) -> Style:
    outline, strength = rng.random() < 0.5, int(rng.integers(1, 4))
    stops = np.linspace(0, 1, len(palette) + 1)[1:-1]

    def apply(frame: Frame, rng: np.random.Generator) -> Frame:
        x = _smooth(frame.astype(np.float32) / 255, strength)
        level = np.digitize(_luma(x), stops)
        y = palette[level]
        if outline:
            y = y * (0.15 + 0.85 * _edges(x, 1.0, 0.98, 60))[..., None]
        return _to_frame(y)

    return apply


def _halftone(palette: Image, rng: np.random.Generator) -> Style:
    pitch, angle, colour = rng.uniform(4, 9), rng.uniform(0, 1.5), _colour_map(palette, rng)
    coloured, paper, ink = rng.random() < 0.5, palette[-1], palette[0]

    def apply(frame: Frame, rng: np.random.Generator) -> Frame:
        x = frame.astype(np.float32) / 255
        u, v = _grid(frame.shape, angle)
        screen = 0.5 + 0.25 * (np.cos(2 * np.pi * u / pitch) + np.cos(2 * np.pi * v / pitch))
        dots = np.clip((cv2.GaussianBlur(_luma(x), (0, 0), 1) - screen) * 6 + 0.5, 0, 1)[..., None]
        return _to_frame(dots * paper + (1 - dots) * (colour(x) * 0.7 if coloured else ink))

    return apply


def _hatching(palette: Image, rng: np.random.Generator) -> Style:
    pitch, angle, paper, ink = rng.uniform(4, 8), rng.uniform(0, 3), palette[-1], palette[0]
    levels = rng.uniform(0.15, 0.3) + np.arange(3) * 0.2
    tint, colour = (0.4 if rng.random() < 0.4 else 0.0), _colour_map(palette, rng)

    def apply(frame: Frame, rng: np.random.Generator) -> Frame:
        x = frame.astype(np.float32) / 255
        light = cv2.GaussianBlur(_luma(x), (0, 0), 1.5)
        drawn = _edges(x, 0.9, 0.97, 40)
        for i, level in enumerate(levels):
            u, _ = _grid(frame.shape, angle + i * 0.9)
            line = 0.5 + 0.5 * np.cos(2 * np.pi * (u + 0.8 * _noise(frame.shape, 12, rng)) / pitch)
            cover = np.clip((level - light) * 4, 0, 0.9)
            drawn = drawn * (1 - np.clip((line - 1 + cover) * 5, 0, 1) * 0.9)
        base = (1 - tint) * paper + tint * colour(x)
        return _to_frame(drawn[..., None] * base + (1 - drawn[..., None]) * ink)

    return apply


def _mosaic(palette: Image, rng: np.random.Generator) -> Style:
    size, jitter = rng.uniform(7, 14), rng.choice([0.05, 0.3, 0.5])
    gap, colour = rng.uniform(0.6, 1.6), _colour_map(palette, rng)
    grout = palette[0] if rng.random() < 0.6 else palette[-1]

    def apply(frame: Frame, rng: np.random.Generator) -> Frame:
        x = frame.astype(np.float32) / 255
        labels, distance = _cells(frame.shape, size, jitter, rng)
        tiles = _mean_per_label(colour(x), labels)
        tiles *= 1 + 0.1 * rng.standard_normal(int(labels.max()) + 1).astype(np.float32)[labels][..., None]
        tile = np.clip(distance / gap - 0.3, 0, 1)[..., None]
        return _to_frame(tile * tiles + (1 - tile) * grout)

    return apply


def _glass(palette: Image, rng: np.random.Generator) -> Style:
    size, lead = rng.uniform(16, 30), rng.uniform(1.2, 2.6)
    vivid = np.clip((palette - palette.mean(1, keepdims=True)) * 1.8 + palette.mean(1, keepdims=True), 0, 1)
    colour = _colour_map(vivid.astype(np.float32), rng)

    def apply(frame: Frame, rng: np.random.Generator) -> Frame:
        x = frame.astype(np.float32) / 255
        labels, distance = _cells(frame.shape, size, 0.5, rng)
        pane = (
            _mean_per_label(colour(x), labels) * (0.8 + 0.3 * np.clip(distance / size * 2, 0, 1))[..., None]
        )
        open_ = np.clip(distance / lead - 0.4, 0, 1)[..., None] * _edges(x, 1.4, 0.98, 30)[..., None]
        return _to_frame(pane * open_ + 0.04 * (1 - open_))

    return apply


def _ink(palette: Image, rng: np.random.Generator) -> Style:
    sigma, tau = rng.uniform(0.7, 1.6), rng.uniform(0.94, 0.985)
    paper, ink = palette[-1], palette[0]
    wash, colour = rng.choice([0.0, 0.0, 0.35]), _colour_map(palette, rng)

    def apply(frame: Frame, rng: np.random.Generator) -> Frame:
        x = frame.astype(np.float32) / 255
        line = _edges(cv2.GaussianBlur(x, (0, 0), 0.6), sigma, tau, 30)[..., None]
        grain = 1 + 0.03 * _noise(frame.shape, 1.5, rng)[..., None]
        base = (1 - wash) * paper + wash * colour(cv2.GaussianBlur(x, (0, 0), 3))
        return _to_frame((line * base + (1 - line) * ink) * grain)

    return apply


def _pixel(palette: Image, rng: np.random.Generator) -> Style:
    block, colour = int(rng.integers(4, 9)), _colour_map(palette, rng)

    def apply(frame: Frame, rng: np.random.Generator) -> Frame:
        h, w = frame.shape[:2]
        small = cv2.resize(frame, (max(1, w // block), max(1, h // block)), interpolation=cv2.INTER_AREA)
        y = colour(small.astype(np.float32) / 255)
        nearest = ((y[:, :, None] - palette) ** 2).sum(-1).argmin(-1)
        return _to_frame(cv2.resize(palette[nearest], (w, h), interpolation=cv2.INTER_NEAREST))

    return apply


def _neon(palette: Image, rng: np.random.Generator) -> Style:
    glow, sigma, colour = rng.uniform(2, 5), rng.uniform(0.8, 1.6), _colour_map(palette[::-1].copy(), rng)
    base = palette[0] * 0.25

    def apply(frame: Frame, rng: np.random.Generator) -> Frame:
        x = frame.astype(np.float32) / 255
        light = (1 - _edges(x, sigma, 0.97, 40))[..., None]
        hue = colour(cv2.GaussianBlur(x, (0, 0), 4))
        hue = hue / np.maximum(hue.max(-1, keepdims=True), 0.2)
        halo = cv2.GaussianBlur(light * hue, (0, 0), glow) * 1.5
        return _to_frame(base + 0.12 * x + halo + light * hue)

    return apply


def _wash(palette: Image, rng: np.random.Generator) -> Style:
    strength, colour, paper = int(rng.integers(2, 5)), _colour_map(palette, rng), rng.uniform(0.9, 1.0)
    line = rng.choice([0.0, 0.6])

    def apply(frame: Frame, rng: np.random.Generator) -> Frame:
        x = _smooth(frame.astype(np.float32) / 255, strength)
        u, v = _noise(frame.shape, 9, rng) * 2.5, _noise(frame.shape, 9, rng) * 2.5
        gx, gy = _grid(frame.shape, 0.0)
        y = cv2.remap(colour(x), gx + u, gy + v, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REFLECT)
        rim = cv2.morphologyEx(y, cv2.MORPH_GRADIENT, np.ones((3, 3)))
        y = y - 0.5 * rim + 0.06 * _noise(frame.shape, 24, rng)[..., None]
        y = paper * (1 - (1 - y) * 0.8) + 0.02 * _noise(frame.shape, 1.5, rng)[..., None]
        return _to_frame(y * (1 - line * (1 - _edges(x, 1.0, 0.97, 30)))[..., None])

    return apply


def _strokes(palette: Image, rng: np.random.Generator) -> Style:
    width, length = rng.uniform(3, 8), rng.uniform(8, 26)
    spread, along = rng.uniform(0.02, 0.08), rng.random() < 0.8
    colour, fixed = _colour_map(palette, rng), rng.uniform(0, np.pi)

    def apply(frame: Frame, rng: np.random.Generator) -> Frame:
        x = frame.astype(np.float32) / 255
        h, w = frame.shape[:2]
        y = colour(cv2.GaussianBlur(x, (0, 0), width / 3))
        g = cv2.GaussianBlur(_luma(x), (0, 0), width / 1.5)
        angle = np.arctan2(cv2.Sobel(g, cv2.CV_32F, 0, 1), cv2.Sobel(g, cv2.CV_32F, 1, 0)) + np.pi / 2
        canvas = y.copy()
        for scale in (1.6, 1.0):
            n = int(1.5 * h * w / (width * length * scale**2)) + 1
            ys, xs = rng.integers(0, h, n), rng.integers(0, w, n)
            a = (angle[ys, xs] if along else fixed) + rng.normal(0, 0.25, n)
            dx, dy = np.cos(a) * length * scale / 2, np.sin(a) * length * scale / 2
            tone = np.clip(
                y[ys, xs] + rng.normal(0, spread, (n, 1)) + rng.normal(0, spread / 2, (n, 3)), 0, 1
            )
            for i in range(n):
                ends = (int(xs[i] - dx[i]), int(ys[i] - dy[i])), (int(xs[i] + dx[i]), int(ys[i] + dy[i]))
                cv2.line(canvas, *ends, tone[i].tolist(), max(1, int(width * scale)), cv2.LINE_AA)
        relief = _luma(canvas) - cv2.GaussianBlur(_luma(canvas), (0, 0), 1.5)
        return _to_frame(canvas + 0.4 * relief[..., None])

    return apply


def _dots(palette: Image, rng: np.random.Generator) -> Style:
    radius, spread = rng.uniform(1.5, 4), rng.uniform(0.05, 0.15)
    colour, paper = _colour_map(palette, rng), palette[int(rng.choice([0, -1]))]

    def apply(frame: Frame, rng: np.random.Generator) -> Frame:
        h, w = frame.shape[:2]
        y = colour(frame.astype(np.float32) / 255)
        canvas = np.broadcast_to(paper, y.shape).astype(np.float32).copy()
        n = int(1.6 * h * w / (radius * radius * 3))
        ys, xs = rng.integers(0, h, n), rng.integers(0, w, n)
        tone = np.clip(y[ys, xs] + rng.normal(0, spread, (n, 3)), 0, 1)
        size = np.maximum(1, (radius * rng.uniform(0.6, 1.2, n)).round()).astype(int)
        for i in range(n):
            cv2.circle(canvas, (int(xs[i]), int(ys[i])), int(size[i]), tone[i].tolist(), -1, cv2.LINE_AA)
        return _to_frame(canvas)

    return apply


def _engraving(palette: Image, rng: np.random.Generator) -> Style:
    pitch, angle, wave = rng.uniform(3.5, 7), rng.uniform(0, 3), rng.uniform(0, 6)
    paper, ink = palette[-1], palette[0]

    def apply(frame: Frame, rng: np.random.Generator) -> Frame:
        x = frame.astype(np.float32) / 255
        light = cv2.GaussianBlur(_luma(x), (0, 0), 1)
        u, _ = _grid(frame.shape, angle)
        line = 0.5 + 0.5 * np.cos(2 * np.pi * (u + wave * cv2.GaussianBlur(light, (0, 0), 4)) / pitch)
        white = np.clip((line - (1 - light)) * 4 + 0.5, 0, 1)[..., None]
        return _to_frame(white * paper + (1 - white) * ink)

    return apply


def _grain(palette: Image, rng: np.random.Generator) -> Style:
    colour, amount, scale = _colour_map(palette, rng), rng.uniform(0.05, 0.2), rng.uniform(1, 3)
    stretch = rng.choice([1.0, 1.0, 4.0])

    def apply(frame: Frame, rng: np.random.Generator) -> Frame:
        h, w = frame.shape[:2]
        y = colour(_smooth(frame.astype(np.float32) / 255, 1))
        grain = cv2.resize(_noise((h, int(w / stretch) + 1), scale, rng), (w, h))
        return _to_frame(y + amount * grain[..., None] * (0.4 + 0.6 * (1 - _luma(y)))[..., None])

    return apply


STYLES: dict[str, Callable[[Image, np.random.Generator], Style]] = {
    "flat": _flat,
    "halftone": _halftone,
    "hatching": _hatching,
    "mosaic": _mosaic,
    "glass": _glass,
    "ink": _ink,
    "pixel": _pixel,
    "neon": _neon,
    "wash": _wash,
    "strokes": _strokes,
    "dots": _dots,
    "engraving": _engraving,
    "grain": _grain,
}


def draw_style(
    rng: np.random.Generator, palette_source: Frame | None = None, name: str | None = None
) -> tuple[str, Style]:
    """Draw a style; its palette is random, or that of ``palette_source`` if one is given."""
    name = name or str(rng.choice(list(STYLES)))
    n = int(rng.integers(3, 8))
    palette = random_palette(rng, n) if palette_source is None else palette_of(palette_source, rng, n)
    return name, STYLES[name](palette, rng)
