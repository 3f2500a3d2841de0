"""Recipes that are run as a script is, but in this process: one of its own would import for seconds."""

import re
import runpy
import sys
from pathlib import Path

import pytest

RECIPES = Path(__file__).parents[2] / "recipes"


def error_of(name: str, arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> str:
    """The one line that a recipe ends with, given its settings and these arguments."""
    recipe = RECIPES / f"{name}.py"
    monkeypatch.setattr(sys, "argv", [str(recipe), "--config", str(recipe.with_suffix(".yaml")), *arguments])
    monkeypatch.syspath_prepend(str(RECIPES))
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(recipe), run_name="__main__")
    assert ended.value.code == 2
    (line,) = re.findall(r"^error: .*$", capsys.readouterr().err, re.M)
    return line
