"""`python -m eosin` is the command `eosin`."""

from eosin.cli.app import main

main()
