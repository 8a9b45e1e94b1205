"""The example pictures in `std_rt/examples`, rendered by code, so that no one else's pictures are shipped.

    python -m tools.render_examples [FOLDER]

Everything is a function of its size and a fixed seed, so two machines render the same pictures. FOLDER gets
``scenes/NAME.jpg`` and ``styles/NAME.jpg``; the default is `std_rt/examples`.
"""

from __future__ import annotations

import sys
from pathlib import Path

from PIL import Image

from tools.scenes import SCENES
from tools.style_pictures import STYLES

SIDE_PX = 512
QUALITY = 92  # without chroma subsampling: 40 dB from the rendering, a quarter of the size of a PNG


def render(folder: Path) -> None:
    """Write every scene and style to ``folder``."""
    for kind, renderers in (("scenes", SCENES), ("styles", STYLES)):
        (folder / kind).mkdir(parents=True, exist_ok=True)
        for name, draw in renderers.items():
            path = folder / kind / f"{name}.jpg"
            Image.fromarray(draw(SIDE_PX)).save(path, quality=QUALITY, subsampling=0)
            print(f"{path}: {path.stat().st_size // 1000} kB")


if __name__ == "__main__":
    here = Path(__file__).resolve().parents[1]
    render(Path(sys.argv[1]) if len(sys.argv) > 1 else here / "std_rt" / "examples")
