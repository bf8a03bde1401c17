"""Published figures belong to the reports beside them."""

import json
from pathlib import Path

import pytest
from PIL import Image

RESULTS = Path(__file__).resolve().parents[1] / "docs" / "results"
DRAWN = sorted(path.parent for path in RESULTS.glob("eval-*/report.png"))


@pytest.mark.parametrize("directory", DRAWN, ids=lambda path: path.name)
def test_a_quality_figure_prints_the_commits_of_its_report(directory):
    """A figure that was drawn before its report was corrected says another commit, or nothing in its Description."""
    machines = json.loads((directory / "report.json").read_text())["machines"]
    with Image.open(directory / "report.png") as picture:
        printed = picture.text.get("Description", "")
    assert machines and all(f"commit {machine['commit']}" in printed for machine in machines)
