"""A page for blind votes on two outputs at a time: opened from a folder, without server or network.

    FOLDER/vote/index.html            what a voter opens; hand on the folder ``vote`` as it is
    FOLDER/vote/pictures/0001-A.jpg   content, style and two outputs of each row, in an order drawn for it
    FOLDER/vote.key.json              which outputs they are: stays here

The page gives a voter's choices as a file, which `blind.read_votes` reads.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from importlib.resources import files
from itertools import combinations
from pathlib import Path

import numpy as np

from std_rt.core.errors import MediaError
from std_rt.core.files import write_text, writing
from std_rt.evaluation.blind import read_key, write_key
from std_rt.evaluation.measures import Frame
from std_rt.evaluation.picture_quality import Pair
from std_rt.media.image import write_picture

__all__ = ["KEY", "PAGE", "plan_rows", "write_page"]

PAGE, KEY = Path("vote/index.html"), Path("vote.key.json")
MOST_ROWS = 120  # about ten minutes of a voter's time
_QUALITY = 95
_ELSEWHERE = "choose another place with -o"

Row = tuple[int, str, str]  # number of a pair, and the two candidates as A and B


def plan_rows(pairs: int, labels: Sequence[str], seed: int) -> list[Row]:
    """What is voted on: every two candidates equally often, each on pairs of its own; at most `MOST_ROWS`.

    Neither the order of the rows nor the side of a candidate says anything about it.
    """
    rng = np.random.default_rng(seed)
    matches = list(combinations(labels, 2))
    each = min(pairs, max(1, MOST_ROWS // len(matches)))
    rows = [(int(i), *match) for match in matches for i in rng.permutation(pairs)[:each]]
    rows = [rows[k] for k in rng.permutation(len(rows))[:MOST_ROWS]]
    turned = rng.permutation(len(rows)) < len(rows) / 2
    return [(i, b, a) if turn else (i, a, b) for (i, a, b), turn in zip(rows, turned, strict=True)]


def write_page(
    folder: Path, pairs: Sequence[Pair], outputs: Mapping[str, Sequence[Frame]], seed: int
) -> bool:
    """Write the page, its pictures and its key; False if there is a page of other candidates already.

    That one is kept, since votes on it may have been cast. Raises MediaError.
    """
    rows = plan_rows(len(pairs), list(outputs), seed)
    run = hashlib.sha256(json.dumps([seed, rows]).encode()).hexdigest()[:12]
    key = folder / KEY
    if key.is_file():
        return read_key(key).run == run
    page = folder / PAGE
    with writing(page, MediaError, _ELSEWHERE):
        (page.parent / "pictures").mkdir(parents=True, exist_ok=True)
    for number, (i, a, b) in enumerate(rows, 1):
        shown = zip(("content", "style", "A", "B"), (*pairs[i], outputs[a][i], outputs[b][i]), strict=True)
        for what, frame in shown:
            write_picture(page.parent / "pictures" / f"{number:04d}-{what}.jpg", frame, quality=_QUALITY)
    text = (files("std_rt.evaluation") / "vote.html").read_text(encoding="utf-8")
    head, _, rest = text.partition("/*RUN*/")
    made = head + json.dumps({"id": run, "rows": len(rows)}) + rest.partition("/*END*/")[2]
    with writing(page, MediaError, _ELSEWHERE):
        write_text(page, made)
    write_key(key, [(a, b) for _, a, b in rows], _ELSEWHERE, run=run, seed=seed)
    return True
