"""Votes on a blind sheet of `std-rt evaluate --blind`, counted.

    python -m tools.tally blind.key.json votes.csv [more.csv ...]

One line per row of the sheet: its number, and the letters from best to worst, as in ``1,C>A=D>B``; or only
the best one, ``2,A``. Printed for each candidate: how often it was best, its mean place, and how often it was
as good as each other one, or better.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from std_rt.cli.terminal import print_table
from std_rt.core.errors import StdRtError
from std_rt.evaluation.blind import read_key, read_votes, tally


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("key", type=Path)
    parser.add_argument("votes", type=Path, nargs="+")
    args = parser.parse_args()
    try:
        orders = read_key(args.key)
        votes = [vote for path in args.votes for vote in read_votes(path, orders)]
    except StdRtError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    counted = tally(votes)
    titles = [f"of {len(votes)} votes", "best", "place", *(f">= {label}" for label in counted)]
    rows = [
        [label, str(one.best), f"{one.place:.2f}", *(str(one.beside.get(other, "-")) for other in counted)]
        for label, one in sorted(counted.items(), key=lambda item: item[1].place)
    ]
    print_table(rows, titles, numeric=True)


if __name__ == "__main__":
    main()
