"""Many pictures, many machines: stylization on Ray Data (extra ``[bulk]``).

    std-rt bulk photos/ --style art.png -o styled

and, in a pipeline of one's own, `stylize`.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from std_rt.bulk.options import BulkOptions

if TYPE_CHECKING:
    from ray.data import Dataset

__all__ = ["BulkOptions", "stylize"]


def stylize(
    dataset: Dataset,
    style: str,
    strength: float = 1.0,
    *,
    column: str = "image",
    into: str = "styled",
    options: BulkOptions | None = None,
    **actors: Any,
) -> Dataset:
    """A Ray Dataset with the pictures of ``column`` in another style, in a new column ``into``.

        pictures = ray.data.read_images("photos", mode="RGB", include_paths=True)
        styled = std_rt.bulk.stylize(pictures, "art.png", options=BulkOptions(size=256))

    ``column`` holds frames uint8 [H, W, 3] RGB, each of its own size; results are those of
    `Stylizer.stylize`, up to one level where pictures share calls. ``style``: path or address of a picture or
    style file, as every machine of the cluster sees it. ``actors``: for `Dataset.map_batches`, such as
    ``batch_size`` or ``num_cpus``, in place of one engine for each GPU, or each machine. Nothing runs until
    the result is read. Raises UsageError if Ray is not installed; later errors come as Ray's.
    """
    from std_rt.core.machine import require

    require("std_rt.bulk", "bulk", "ray", "pyarrow")
    from std_rt.bulk.cluster import connect, engines_for
    from std_rt.bulk.column import PaintColumn

    options = options or BulkOptions()
    connect()
    found = engines_for(options.backend, options.cores)
    options = replace(options, cores=found.cores)
    settings = found.actors() | {"batch_size": 32} | actors
    return dataset.map_batches(
        PaintColumn,
        fn_constructor_args=(options, style, strength, column, into),
        batch_format="numpy",
        **settings,
    )
