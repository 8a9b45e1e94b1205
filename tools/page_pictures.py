"""The pictures of the page in docs/images, made anew: `python -m tools.page_pictures`.

The page of `std-rt serve` in Chromium without a window, with the built-in model, an example picture and the
example styles. Needs the extra [serve], and Chromium.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from io import BytesIO
from pathlib import Path

from PIL import Image

from std_rt.examples import scenes
from std_rt.media import write_picture
from tools.browser import Page, browser

_ROOT = Path(__file__).parents[1]

_SCENE = "cat"
_QUALITY = 88
# The sum of all pixels, which changes with what is painted.
_SUM = """(() => { const c = document.getElementById('canvas');
  return c.getContext('2d').getImageData(0, 0, c.width, c.height).data.reduce((a, b) => a + b); })()"""


def choose(page: Page, style: str) -> None:
    """A style by its name, painted when this returns."""
    before = page.run(_SUM)
    names = "[...document.querySelectorAll('#styles .name')]"
    page.run(
        f"{names}.find((each) => each.textContent === {style!r}).closest('li').querySelector('.pick').click()"
    )
    page.until(f"{_SUM} !== {before}")
    page.run("new Promise((done) => setTimeout(done, 4000))")  # the crossfade, and what a page sends after it


def keep(page: Page, name: str) -> None:
    """What the page shows now, as docs/images/NAME.jpg."""
    with tempfile.TemporaryDirectory() as folder:
        shot = Path(folder) / "shot.png"
        page.screenshot(shot)
        Image.open(BytesIO(shot.read_bytes())).convert("RGB").save(
            _ROOT / "docs" / "images" / f"{name}.jpg", quality=_QUALITY
        )


def main() -> None:
    """See the module."""
    command = [sys.executable, "-m", "std_rt", "serve", "--no-open", "--port", "0", "--size", "512"]
    with (
        tempfile.TemporaryDirectory() as folder,
        subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server,
        browser() as page,
    ):
        assert server.stdout is not None
        picture = Path(folder) / "cat.png"
        write_picture(picture, scenes()[_SCENE])
        try:
            page.size(1240, 830)
            page.open(server.stdout.readline().strip())
            page.until("document.querySelectorAll('#styles li').length > 3")
            page.put_file("#file-input", picture)
            page.until("document.getElementById('empty').hidden")
            choose(page, "wave")
            page.run("const d = document.getElementById('divider'); d.value = 50; d.oninput()")
            keep(page, "serve")
            page.run("{ const d = document.getElementById('divider'); d.value = 0; d.oninput(); }")
            page.size(383, 829)
            choose(page, "swirls")
            keep(page, "serve_phone")
        finally:
            server.terminate()


if __name__ == "__main__":
    main()
