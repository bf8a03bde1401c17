"""The `npu-sparse` command, also `python -m npu_sparse`."""

import sys


def main() -> int | None:
    """The exit status of the command line in `sys.argv`."""
    from npu_sparse.cli import main as run

    return run()


if __name__ == "__main__":
    sys.exit(main())
