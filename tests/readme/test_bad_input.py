"""docs/bad_input.md: every clause names a test, and every test that it names is there."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_every_clause_has_its_test():
    text = (ROOT / "docs" / "bad_input.md").read_text()
    rows = [line for line in text.splitlines() if line.startswith("| ") and not line.startswith("| what |")]
    assert len(rows) > 150
    assert [row for row in rows if "::test_" not in row] == []
    named = re.findall(r"`([\w/]+\.py)::(test_\w+)`", text)
    sources = {file: (ROOT / "tests" / file).read_text() for file, _ in named}
    assert [f"{file}::{name}" for file, name in named if f"def {name}(" not in sources[file]] == []
