"""`python -m services.cli` is `specfleet`."""

from services.cli.main import main

main()
