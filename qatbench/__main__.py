"""python -m qatbench."""

from qatbench.cli import main

main()
