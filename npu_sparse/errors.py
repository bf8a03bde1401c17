"""Errors that a user can act on.

Each says in one sentence what is wrong, and knows the exit status of a command that ends with it. What is no such error, and no
builtin one of a caller's mistake, is a bug and keeps its traceback.
"""

USER_ERROR, FAILURE = 2, 1  # exit statuses: a mistake in what was asked for, and what could not be done
UNFINISHED = 3  # exit status of a command that reached its time limit; the same command resumes it


class ActionableError(Exception):
    """A base for errors whose message is the whole story; the second base is the builtin error that it is a case of."""

    exit_status = FAILURE
