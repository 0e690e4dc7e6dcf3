"""`python -m qpa.cli` is the same command as `qpa`."""

from qpa.cli.main import main

main()
