"""`python -m weightlab` is the `weightlab` command."""

from weightlab.cli import main

main()
