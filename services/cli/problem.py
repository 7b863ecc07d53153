"""What goes wrong for a person at a terminal: one sentence on standard error, exit code 1, no stack trace."""

from safetensors import SafetensorError

TROUBLE = (ValueError, OSError, RuntimeError, SafetensorError)  # what training and measuring raise for what they are given or lack


class Problem(Exception):
    """A sentence for the person who typed the command."""


def sentence(error: BaseException) -> str:
    """The first line of what an error says; its kind, if it says nothing."""
    return next(iter(str(error).splitlines()), "") or type(error).__name__
