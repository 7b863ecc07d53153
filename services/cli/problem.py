"""What goes wrong for a person at a terminal: one sentence on standard error, exit code 1, no stack trace."""


class Problem(Exception):
    """A sentence for the person who typed the command."""
