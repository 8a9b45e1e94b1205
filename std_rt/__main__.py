"""``python -m std_rt``: the same as ``std-rt``."""

from std_rt.cli import main

main()
