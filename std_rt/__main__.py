"""``python -m std_rt``: the same as ``std-rt``."""

from std_rt.cli.app import main

main()
