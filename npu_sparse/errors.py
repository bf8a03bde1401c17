"""Errors that a user can act on.

Each says in one sentence what is wrong and knows the exit status of a command that ends with it. Any other error, except the
builtin ones for a caller's mistake, is a bug and keeps its traceback.
"""

import sys

USER_ERROR, FAILURE = 2, 1  # exit statuses: a mistake in what was asked for, and what could not be done
UNFINISHED = 3  # exit status of a command that reached its time limit; the same command resumes it


class ActionableError(Exception):
    """A base for errors whose message says all that a user needs. Their second base is the builtin error that they specialise."""

    exit_status = FAILURE


def full_device_error() -> type[Exception] | tuple:
    """Torch's class for a device whose memory is full; (), of which nothing is an instance, where torch is not loaded."""
    return getattr(sys.modules.get("torch"), "OutOfMemoryError", ())
