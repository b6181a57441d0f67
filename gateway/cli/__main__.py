"""``python -m gateway.cli``: the same as ``sessile``."""

from gateway.cli.main import main

main()
