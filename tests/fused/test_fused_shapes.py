"""Shapes written in fused/ hold for every block: the import hook over all of it takes too long for every test."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
BROKEN = """
from klft.fused import torch_backend
import torch
z, workspace = torch.zeros(3, 5), torch_backend.Workspace(torch.device("cpu"))
try:
    torch_backend.max_and_sum_(z, torch.zeros(2), torch.zeros(3), workspace)
except Exception as error:
    print(type(error).__name__)
"""


def fresh(folder):
    """The hook keeps what a hooked module imports as hooked too, hooked or not: bytecode of its own."""
    return {"env": os.environ | {"PYTHONPYCACHEPREFIX": str(folder)}, "capture_output": True, "text": True}


@pytest.mark.slow
def test_every_shape_of_a_block(tmp_path):
    modules = ",".join(f"klft.fused.{name}" for name in ("collectives", "model_side", "torch_backend"))
    addopts = f"addopts=-q --jaxtyping-packages={modules},beartype.beartype"
    tests = [HERE / "test_fused_laws.py", HERE / "test_fused.py"]
    done = subprocess.run([sys.executable, "-m", "pytest", "-o", addopts, *tests], **fresh(tmp_path))
    assert done.returncode == 0, done.stdout[-3000:]


@pytest.mark.slow
def test_a_wrong_shape_is_found(tmp_path):
    hook = "from jaxtyping import install_import_hook as i; i('klft.fused.torch_backend', 'beartype.beartype')\n"
    done = subprocess.run([sys.executable, "-c", hook + BROKEN], check=True, **fresh(tmp_path))
    assert done.stdout.strip() == "TypeCheckError"
