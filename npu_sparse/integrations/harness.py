"""`npu-sparse lm-eval`: lm-eval's own command line, with the model `npu-sparse` registered."""

import sys

from ..errors import FAILURE, ActionableError


class HarnessMissingError(ActionableError, RuntimeError):
    """lm-eval is not installed."""

    exit_status = FAILURE


def run_harness(arguments: list[str]) -> None:
    """Runs lm-eval with `arguments`, as `lm-eval` would take them. Raises HarnessMissingError where it is not installed."""
    try:
        from lm_eval.__main__ import cli_evaluate
    except ModuleNotFoundError as error:
        raise HarnessMissingError(
            f"lm-eval must be installed (no module {error.name!r}): pip install -e '.[lm-eval]' in a clone of npu-sparse"
        ) from error
    from . import lm_eval  # noqa: F401  registers the model

    before = sys.argv
    sys.argv = ["lm-eval", *arguments]
    try:
        cli_evaluate()
    finally:
        sys.argv = before
