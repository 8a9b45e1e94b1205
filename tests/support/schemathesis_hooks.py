"""Read by schemathesis: what a schema cannot say, so that valid requests come to be painted.

``SAMPLES`` is a folder of files that are called after their media types, such as ``image_png``, and a
``known.json`` with the ids of ``styles`` and the ``key`` of a session.
"""

from __future__ import annotations

import itertools
import json
import os
from pathlib import Path
from typing import Any

import schemathesis
from hypothesis import strategies as st

_folder = Path(os.environ["SAMPLES"])
_known = json.loads((_folder / "known.json").read_text(encoding="utf-8"))
_count = itertools.count()

for _path in _folder.glob("*_*"):
    schemathesis.openapi.media_type(_path.name.replace("_", "/"), st.just(_path.read_bytes()))


@schemathesis.hook
def before_load_schema(context: Any, described: dict[str, Any]) -> None:
    """Which styles are here, a size that the bundle takes, and how many weights.

    (It sends files of a list without their names.)
    """
    described["components"]["schemas"]["StyleHere"] = {"enum": _known["styles"]}
    described["components"]["schemas"]["Sides"] = {"enum": ["64x48"]}
    for path in ("/v1/stylize", "/v1/jobs"):
        form = described["paths"][path]["post"]["requestBody"]["content"]["multipart/form-data"]
        fields = form["schema"]["properties"]
        fields["style"]["items"] = {"$ref": "#/components/schemas/StyleHere"}
        fields["weights"]["pattern"] = r"^[1-9](\.[0-9],[1-9])?$"


@schemathesis.hook
def before_call(context: Any, case: Any, **_: Any) -> None:
    """A session that is there, in three of four valid requests."""
    is_valid = case.meta is not None and case.meta.generation.mode.is_positive
    if is_valid and "key" in (case.path_parameters or {}) and next(_count) % 4:
        case.path_parameters["key"] = _known["key"]


@schemathesis.hook
def filter_failure(context: Any, failure: Any, case: Any, response: Any) -> bool:
    """In a form all is text: a number in place of a text is no wrong type."""
    return case.media_type != "multipart/form-data" or "(was string, became" not in str(failure)
