"""CANN on this machine: where its toolkit is, which version, and which chips the kernels are for. Imports nothing heavy.

Versions and chips are checked where a library is built and again where it is loaded: a kernel of another architecture would fail
at its first launch with nothing but an error number.
"""

import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from .errors import ActionableError

OLDEST = (8, 5)  # the first whose bisheng takes `-x asc --npu-arch`
ATTRIBUTES = (9, 1)  # the first that documents `__mix__` and `__schedmode__`; older ones want a macro in the kernel's body
ROOTS = ("/usr/local/Ascend/cann", "/usr/local/Ascend/ascend-toolkit/latest")  # where newer and older versions install themselves
ARCHITECTURE = "dav-2201"
CHIPS = "Ascend 910B (Atlas A2) and 910C (Atlas A3)"
_BISHENG = ("bin", "compiler/ccec_compiler/bin", "tools/bisheng_compiler/bin")
# 910B1 to 910B4 (with suffixes: 910B2C, 910B4-1), and 910C, which the runtime calls 910_9391 or the like and npu-smi just 910
_SERVED = re.compile(r"^Ascend\s?910(B\d[\w-]*|_93\d\d|C)$")
_SERVED_BY_SMI = re.compile(r"^Ascend\s?910(B\d[\w-]*|_93\d\d|C|)$")


class CannError(ActionableError, RuntimeError):
    """A toolkit that is missing or too old, or a chip that the kernels are not for; the message says what was looked at."""


@dataclass(frozen=True)
class Toolkit:
    """An installed toolkit. `version` is () where no file says it."""

    root: Path
    bisheng: Path
    version: tuple[int, ...]

    @property
    def has_attributes(self) -> bool:
        """Whether the compiler is known to take a kernel's cores as attributes; an unknown version counts as a new one."""
        return not self.version or self.version >= ATTRIBUTES


def find() -> Toolkit:
    """The toolkit that ASCEND_HOME_PATH names, else that of the first usual place. Raises CannError where none is of use."""
    home = os.environ.get("ASCEND_HOME_PATH")
    looked = [Path(home)] if home else [Path(root) for root in ROOTS]
    for root in looked:
        for folder in _BISHENG:
            if (root / folder / "bisheng").is_file() and (root / "include").is_dir():
                toolkit = Toolkit(root, root / folder / "bisheng", numbers(version(root)))
                if toolkit.version and toolkit.version < OLDEST:
                    raise CannError(f"CANN must be {_dotted(OLDEST)} or newer, got {version(root)} in {root}")
                return toolkit
    said = "which ASCEND_HOME_PATH names" if home else "as ASCEND_HOME_PATH is not set"
    raise CannError(
        f"no CANN toolkit: looked for include/ and bisheng (in {', '.join(_BISHENG)}) in {', '.join(map(str, looked))}, {said}; "
        f"install CANN {_dotted(OLDEST)} or newer and run `source {set_env()}`"
    )


def version(root: Path) -> str | None:
    """What the files of a toolkit say of its version, such as "9.1.0"; None where none does."""
    for path in (root / "version.cfg", *sorted(root.glob("*/ascend_toolkit_install.info"))):
        try:
            match = re.search(r"version\w*\s*=\s*\[?[^\d\n]*(\d+(?:\.\w+)+)", path.read_text(errors="replace"))
        except OSError:
            continue
        if match:
            return match.group(1)
    return None


def installed_version() -> str:
    """The version of the toolkit in use, for the name of what is built with it."""
    try:
        return version(find().root) or "unknown"
    except CannError:
        return "none"


def set_env() -> str:
    """The script that sets CANN up in a shell: of the first usual place that has one."""
    scripts = [Path(root).parent / "set_env.sh" if Path(root).name == "latest" else Path(root) / "set_env.sh" for root in ROOTS]
    return str(next((script for script in scripts if script.is_file()), scripts[0]))


def unserved(chip: str, told_by_smi: bool = False) -> str | None:
    """Why the kernels are not for a chip of this name, in one sentence; None for those that they are for."""
    if (_SERVED_BY_SMI if told_by_smi else _SERVED).match(chip.strip()):
        return None
    return f"the card must be an {CHIPS.replace(' and ', ' or ')}, for which the kernels are built ({ARCHITECTURE}), got {chip}"


def explained(error: BaseException) -> str | None:
    """What to do where `import torch` failed because torch_npu, which it imports, finds no CANN; None for any other error."""
    if "torch_npu" not in str(error) or not isinstance(error, (ImportError, RuntimeError)):
        return None
    cause = error
    while (cause.__cause__ or cause.__context__) is not None:
        cause = cause.__cause__ or cause.__context__
    if not isinstance(cause, ImportError) or ".so" not in str(cause):
        return None
    why = str(cause).partition(" cannot open")[0].rstrip(":")
    return (
        f"torch_npu must find CANN, got none in this shell ({why} is missing): run `source {set_env()}`, or "
        "`export TORCH_DEVICE_BACKEND_AUTOLOAD=0` to work without an NPU"
    )


@contextmanager
def required() -> Iterator[None]:
    """Around a program's first `import torch`: what `explained` explains ends it in that sentence, with exit status 1."""
    try:
        yield
    except (ImportError, RuntimeError) as error:
        said = explained(error)
        if said is None:
            raise
        sys.exit(f"error: {said}")


def check_cards(smi: Callable[[], str | None] | None = None) -> None:
    """Raises CannError where npu-smi shows cards, but none that the kernels are for. A machine without cards may build."""
    shown = chips((smi or _smi)() or "")
    refusals = [unserved(chip, told_by_smi=True) for chip in shown]
    if shown and all(refusals):
        raise CannError(refusals[0])


def chips(smi: str) -> list[str]:
    """The chips of `npu-smi info -m`."""
    return re.findall(r"\b(Ascend\s?\S+)\s*$", smi, re.M)


def numbers(version: str | None) -> tuple[int, ...]:
    """The first two numbers of a version, () if it does not begin with any."""
    match = re.match(r"(\d+)\.(\d+)", version or "")
    return tuple(map(int, match.groups())) if match else ()


def _dotted(version: tuple[int, ...]) -> str:
    return ".".join(map(str, version))


def _smi() -> str | None:
    try:
        return subprocess.run(["npu-smi", "info", "-m"], capture_output=True, text=True, timeout=10).stdout
    except (OSError, subprocess.TimeoutExpired):
        return None
