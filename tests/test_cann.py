"""CANN's toolkit and the chips that the kernels are for."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from npu_sparse import ascendc, cann

ROOT = Path(__file__).parents[1]

SERVED = ["Ascend910B1", "Ascend910B2", "Ascend910B2C", "Ascend910B3", "Ascend910B4", "Ascend910B4-1", "Ascend 910B3"]
SERVED += ["Ascend910_9391", "Ascend910_9372", "Ascend910C"]
OTHERS = ["Ascend310P3", "Ascend310B4", "Ascend950PR_9599", "Ascend910", "Ascend910A", "Ascend910ProB", "Ascend1000", "", "B3"]


@pytest.mark.parametrize("chip", SERVED)
def test_chips_of_the_architecture_are_served(chip):
    assert cann.unserved(chip) is None and cann.unserved(chip, told_by_smi=True) is None


@pytest.mark.parametrize("chip", OTHERS)
def test_other_and_unknown_chips_are_refused_by_name(chip):
    assert cann.unserved(chip).endswith(f"for which the kernels are built (dav-2201), got {chip}")


def test_npu_smi_calls_a_910c_just_910():
    assert cann.unserved("Ascend910", told_by_smi=True) is None
    assert cann.unserved("Ascend910A", told_by_smi=True) and cann.unserved("Ascend 310P3", told_by_smi=True)


def smi(*chips: str) -> str:
    return "\n".join(["NPU ID   Chip ID   Chip Name", *(f"{i}   0   {chip}" for i, chip in enumerate(chips)), "0   1   Mcu"])


def test_a_machine_is_refused_where_none_of_its_cards_is_served():
    cann.check_cards(lambda: smi())
    cann.check_cards(lambda: None)  # no npu-smi: a library may be built for another machine
    cann.check_cards(lambda: smi("Ascend 310P3", "Ascend 910B3"))
    with pytest.raises(cann.CannError, match="got Ascend 310P3$"):
        cann.check_cards(lambda: smi("Ascend 310P3", "Ascend 950PR"))


@pytest.mark.parametrize(
    "file, text, version",
    [
        ("version.cfg", "toolkit_installed_version=[9.1.0:8.5.0]\n", "9.1.0"),
        ("aarch64-linux/ascend_toolkit_install.info", "package_name=Ascend-cann-toolkit\nversion=8.5.0\n", "8.5.0"),
        ("version.cfg", "nothing here\n", None),
        ("other.cfg", "version=9.1.0\n", None),
    ],
)
def test_the_version_is_read_from_the_files_of_an_installation(tmp_path, file, text, version):
    (tmp_path / file).parent.mkdir(exist_ok=True)
    (tmp_path / file).write_text(text)
    assert cann.version(tmp_path) == version


def put(root, version=None):
    (root / "include").mkdir(parents=True)
    (root / "bin").mkdir()
    (root / "bin/bisheng").write_text("")
    if version:
        (root / "version.cfg").write_text(f"version=[{version}]\n")


def test_the_newer_root_comes_first_and_the_older_one_is_found_too(monkeypatch, tmp_path):
    newer, older = tmp_path / "cann", tmp_path / "ascend-toolkit/latest"
    monkeypatch.delenv("ASCEND_HOME_PATH", raising=False)
    monkeypatch.setattr(cann, "ROOTS", (str(newer), str(older)))
    with pytest.raises(cann.CannError, match=f"in {newer}, {older}, as ASCEND_HOME_PATH is not set; install CANN 8.5 or newer"):
        cann.find()
    assert cann.installed_version() == "none" and cann.set_env() == str(newer / "set_env.sh")
    put(older, "8.5.1")
    (older.parent / "set_env.sh").write_text("")
    assert cann.find() == cann.Toolkit(older, older / "bin/bisheng", (8, 5))
    assert not cann.find().has_attributes and cann.set_env() == str(older.parent / "set_env.sh")
    put(newer)
    assert cann.find().root == newer and cann.find().has_attributes and cann.installed_version() == "unknown"


def test_a_library_for_another_card_is_not_loaded(monkeypatch, tmp_path):
    """What the library says of the card under it is asked before any of its kernels is."""
    import torch

    class Library:
        def soc_name(self):
            return "Ascend310P3"

    monkeypatch.setattr(ascendc, "library", lambda target: tmp_path / "lib.so")
    monkeypatch.setattr(ascendc, "_misfit", lambda path: None)
    monkeypatch.setattr(torch.ops, "load_library", lambda path: None)
    monkeypatch.setattr(torch.ops, "npu_sparse_npu", Library(), raising=False)
    with pytest.raises(ascendc.BuildError, match="the card must be .*, got Ascend310P3"):
        ascendc.load("npu")


def failing(first: Exception, then: Exception) -> Exception:
    try:
        try:
            raise first
        except Exception as error:
            raise then from error
    except Exception as error:
        return error


def test_only_what_cann_would_mend_is_explained_by_cann():
    missing = ImportError("libhccl.so: cannot open shared object file: No such file or directory")
    torch = RuntimeError("Failed to load the backend extension: torch_npu. You can disable extension auto-loading")
    said = cann.explained(failing(missing, torch))
    assert said.startswith("torch_npu must find CANN, got none in this shell (libhccl.so is missing): run `source ")
    assert cann.explained(failing(missing, RuntimeError("of something else"))) is None
    assert cann.explained(failing(ValueError("torch_npu is odd"), torch)) is None
    assert cann.explained(ValueError("torch_npu must have torch")) is None


WITHOUT_CANN = """
try:
    raise ImportError("libhccl.so: cannot open shared object file: No such file or directory")
except ImportError as error:
    raise RuntimeError("Failed to load the backend extension: torch_npu. You can disable extension auto-loading") from error
"""
SCRIPTS = sorted(path for path in (ROOT / "scripts").glob("*.py") if "torch" in path.read_text())


@pytest.mark.parametrize("script", SCRIPTS, ids=[path.stem for path in SCRIPTS])
def test_without_cann_a_script_that_wants_torch_ends_with_a_sentence(tmp_path, script):
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch/__init__.py").write_text(WITHOUT_CANN)
    env = {**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}
    ended = subprocess.run([sys.executable, script, "--help"], env=env, capture_output=True, text=True, timeout=60)
    assert "Traceback" not in ended.stderr
    if ended.returncode:
        (sentence,) = ended.stderr.splitlines()
        assert sentence.startswith("error: torch_npu must find CANN, got none in this shell (libhccl.so is missing): run")
    else:  # torch is imported when the work begins
        assert ended.stdout.startswith("usage: ")


def test_other_failures_of_an_import_stay_what_they_are():
    with pytest.raises(ImportError, match="no such module"), cann.required():
        raise ImportError("no such module")
