"""The house: who may import whom, tests too, how long a module may be, and what `import klft` loads."""

import ast
import subprocess
import sys
import tokenize
from pathlib import Path

import pytest

import klft

ROOT = Path(__file__).resolve().parents[1]

FLOORS = {
    "_version": 0, "_deprecated": 0, "writing": 0, "masked": 0, "divergences": 0, "controllers": 0, "token_rules": 0,
    "choices": 0,
    "estimators": 1, "shaping": 1, "sharding": 1, "scores": 1, "exits": 1,
    "models": 2, "parallel": 2, "heads": 2,
    "fused": 3,
    "hub": 4, "loading": 4, "references": 4, "reference": 4, "prompts": 4, "scoring": 4, "generation": 4,
    "penalty": 5, "checks": 5,
    "ppo": 6, "integrations": 6, "diagnostics": 6, "plots": 6,
    "arguments": 7, "doctor": 7, "cli": 7, "__main__": 7,
}  # fmt: skip
TOP = 7
# Within a floor a module may import those that stand before it here; no others.
WITHIN = [
    ("writing", "choices"), ("estimators", "scores"), ("models", "parallel", "heads"), ("hub", "loading"),
    ("references", "scoring"),
    ("prompts", "scoring", "generation"), ("diagnostics", "plots"),
    ("arguments", "doctor", "cli", "__main__"),
]  # fmt: skip
TENSORS = {"torch", "jaxtyping"}
ARRAYS = TENSORS | {"torch.distributed"}
MODELS = ARRAYS | {"transformers", "peft"}
TRAINING = MODELS | {
    "accelerate", "datasets", "trl", "jinja2", "matplotlib", "numpy", "pyarrow", "rich", "safetensors", "filelock",
    "xxhash",
}  # fmt: skip
OUTSIDE = {
    0: TENSORS,
    1: ARRAYS,
    2: MODELS | {"accelerate"},
    3: ARRAYS,  # and triton, in triton_backend
    4: MODELS | {"trl", "safetensors", "huggingface_hub"},
    5: MODELS | {"trl"},
    6: TRAINING,
}
INSIDE_FUNCTIONS_BELOW_6 = {"transformers", "peft", "accelerate", "trl"}
BUDGET = 12_300  # lines of code in klft/: what is added must be worth its share
BRIDGES = {  # who writes the tables of diagnostics; loaded only when they are asked for
    "klft/ppo/tokens.py": "diagnostics",
    "klft/integrations/tokens.py": "diagnostics",
}
PRIVATE_PARTS = ("trl.experimental", "trl.trainer.utils", "trl.kernels")


# --- reading source --------------------------------------------------------------------------------------------------


def sources(folder):
    return sorted(folder.rglob("*.py")) if folder.is_dir() else []


def module_of(path, package):
    """The part of the house a file belongs to: klft/ppo/losses.py -> ppo."""
    return path.relative_to(package).parts[0].removesuffix(".py")


def _package_of(path, package):
    return [package.name, *path.relative_to(package).parent.parts]


def imports(path, package=None):
    """(dotted name, line, inside a function or only for type checkers) of everything a file imports.

    `from a import b` gives a.b: b may be a module. import_module("a") counts as an import of a.
    """
    found = []

    def visit(node, deferred):
        if isinstance(node, ast.Import):
            found.extend((alias.name, node.lineno, deferred) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parts = _package_of(path, package) if package else []
                base = ".".join([*parts[: len(parts) - node.level + 1], *([base] if base else [])])
            found.extend((f"{base}.{alias.name}", node.lineno, deferred) for alias in node.names)
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in (
            "import_module",
            "importlib.import_module",
            "__import__",
        ):
            if node.args and isinstance(node.args[0], ast.Constant):
                found.append((str(node.args[0].value), node.lineno, deferred))
        elif isinstance(node, ast.Attribute):
            dotted = ast.unparse(node)
            if dotted.startswith(("torch.distributed.", "trl.", "transformers.", "klft.")):
                found.append((dotted, node.lineno, True))
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)) or (
            isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING")
        ):
            deferred = True
        for child in ast.iter_child_nodes(node):
            visit(child, deferred)

    visit(ast.parse(path.read_text()), False)
    return found


def private(name):
    """Why an imported or used name of trl or transformers is not public, or None."""
    top, *rest = name.split(".")
    if top not in ("trl", "transformers"):
        return None
    if any(name == part or name.startswith(part + ".") for part in PRIVATE_PARTS):
        return f"{name} is not public"
    if any(part.startswith("_") and not part.endswith("__") for part in rest):
        return f"{name} has a private name in it"
    if top == "trl" and len(rest) > 1 and rest[0][0].islower():
        return f"{name} is not a top-level name of trl"
    return None


# --- floors ----------------------------------------------------------------------------------------------------------


def _internal(module, name):
    """Why `module` may not import klft's `name`, or None."""
    target = name.split(".")[1] if "." in name else "*"
    if target.startswith("__") or module in (target, "__init__"):
        return None
    if target not in FLOORS:
        return None if FLOORS[module] == TOP else f"{name}: import from the module, not from the package root"
    if any(target in row and module in row and row.index(target) < row.index(module) for row in WITHIN):
        return None
    if FLOORS[target] >= FLOORS[module]:
        return f"{name} is on floor {FLOORS[target]}, {module} on floor {FLOORS[module]}"
    return None


def _external(module, stem, name, deferred):
    """Why `module` may not import `name` from outside klft, or None."""
    top = name.split(".")[0]
    if top in sys.stdlib_module_names:
        return None
    if module == "controllers":
        return f"{name}: controllers use the standard library only"
    if module == "__init__":
        return f"{name}: the package root imports klft only"
    floor = FLOORS[module]
    if floor == TOP:
        return None
    wanted = "torch.distributed" if name.startswith("torch.distributed") else top
    if wanted == "triton" and stem == "triton_backend":
        return None
    if wanted not in OUTSIDE[floor]:
        return f"{name} is not for floor {floor}"
    if floor < 6 and wanted in INSIDE_FUNCTIONS_BELOW_6 and not deferred:
        return f"{name} belongs inside a function on floor {floor}"
    return None


def violations(root):
    """Every broken rule about imports under root/klft and root/recipes, as "file:line: reason"."""
    found = []
    package = root / "klft"
    for path in sources(package):
        module = module_of(path, package)
        if module not in FLOORS and module != "__init__":
            found.append(f"{path.relative_to(root)}:1: {module} has no floor")
            continue
        for name, line, deferred in imports(path, package):
            top = name.split(".")[0]
            if top == "klft":
                bridge = f"{name}.".startswith(f"klft.{BRIDGES.get(path.relative_to(root).as_posix())}.")
                reason = None if bridge else _internal(module, name)
            elif top in ("recipes", "tests"):
                reason = f"{name}: the library imports neither recipes nor tests"
            else:
                reason = _external(module, path.stem, name, deferred) or private(name)
            if reason:
                found.append(f"{path.relative_to(root)}:{line}: {reason}")
    for path in sources(root / "recipes"):
        for name, line, _ in imports(path):
            reason = private(name)
            parts = name.split(".")
            if parts[0] == "klft":
                if any(part.startswith("_") and not part.endswith("__") for part in parts):
                    reason = f"{name} is private"
                elif len(parts) == 2 and parts[1] not in {*klft.__all__, *FLOORS, "__version__"}:
                    reason = f"{name} is not a public name"
            if reason:
                found.append(f"{path.relative_to(root)}:{line}: {reason}")
    return found


def test_floors():
    assert violations(ROOT) == []


BROKEN = [
    ("klft/divergences.py", "from klft.estimators import k1", "floor 1"),
    ("klft/masked.py", "from klft.divergences import gap", "floor 0"),
    ("klft/scores.py", "from klft.heads import LMHead", "floor 2"),
    ("klft/models.py", "from klft.heads import LMHead", "floor 2"),
    ("klft/parallel.py", "from klft.heads import LMHead", "floor 2"),
    ("klft/heads.py", "from klft.fused import token_scores", "floor 3"),
    ("klft/fused/tile.py", "from klft.scoring import score_texts", "floor 4"),
    ("klft/references/frozen.py", "from klft.scoring import score_texts", "floor 4"),
    ("klft/prompts.py", "from klft.generation import generate", "floor 4"),
    ("klft/ppo/losses.py", "from klft.integrations import KLReward", "floor 6"),
    ("klft/ppo/losses.py", "from ..diagnostics import stats", "floor 6"),
    ("klft/ppo/losses.py", "from klft import cli", "floor 7"),
    ("klft/ppo/tokens.py", "from klft.integrations import KLReward", "floor 6"),
    ("klft/integrations/grpo.py", "import klft.diagnostics", "floor 6"),
    ("klft/arguments.py", "from klft.cli import main", "floor 7"),
    ("klft/penalty.py", "from klft import reverse_kl", "package root"),
    ("klft/estimators.py", "def f():\n    from klft.penalty import KLPenalty", "floor 5"),
    ("klft/controllers.py", "import torch", "standard library only"),
    ("klft/divergences.py", "import numpy", "not for floor 0"),
    ("klft/masked.py", "import torch.distributed as dist", "not for floor 0"),
    ("klft/masked.py", "from torch import distributed", "not for floor 0"),
    ("klft/masked.py", "import torch\ntorch.distributed.all_reduce(1)", "not for floor 0"),
    ("klft/heads.py", "from transformers import AutoModel", "inside a function"),
    ("klft/heads.py", "def f():\n    import trl", "not for floor 2"),
    ("klft/fused/torch_backend.py", "import triton", "not for floor 3"),
    ("klft/references/frozen.py", "from transformers import PreTrainedModel", "inside a function"),
    ("klft/references/adapter.py", "import peft", "inside a function"),
    ("klft/prompts.py", "from trl import apply_chat_template", "inside a function"),
    ("klft/penalty.py", "def f():\n    import datasets", "not for floor 5"),
    ("klft/penalty.py", "def f():\n    import_module('accelerate')", "not for floor 5"),
    ("klft/ppo/trainer.py", "import wandb", "not for floor 6"),
    ("klft/__init__.py", "import transformers", "package root"),
    ("klft/cli.py", "from recipes import demo", "neither recipes nor tests"),
    ("klft/integrations/grpo.py", "from tests import tiny", "neither recipes nor tests"),
    ("klft/utils.py", "", "no floor"),
    ("klft/integrations/grpo.py", "from trl.experimental.ppo import PPOTrainer", "not public"),
    ("klft/integrations/grpo.py", "from trl.trainer.utils import pad", "not public"),
    ("klft/integrations/grpo.py", "import trl.kernels", "not public"),
    ("klft/integrations/grpo.py", "import trl\ntrl.experimental.ppo", "not public"),
    ("klft/integrations/grpo.py", "from trl.trainer.grpo_trainer import GRPOTrainer", "top-level"),
    ("klft/integrations/grpo.py", "from trl import _LazyModule", "private name"),
    ("klft/integrations/grpo.py", "from transformers.trainer import _is_peft_model", "private name"),
    ("klft/cli.py", "import transformers\ntransformers._x.y", "private name"),
    ("recipes/a.py", "from trl.trainer.utils import pad", "not public"),
    ("recipes/a.py", "from transformers.utils import _secret", "private name"),
    ("recipes/a.py", "from klft.penalty import _secret", "private"),
    ("recipes/a.py", "from klft import gap", "not a public name"),
    ("recipes/a.py", "import klft\nklft._HOME", "private"),
]


@pytest.mark.parametrize(("where", "text", "reason"), BROKEN)
def test_a_broken_tree_is_reported(tmp_path, where, text, reason):
    path = tmp_path / where
    path.parent.mkdir(parents=True)
    path.write_text(text + "\n")
    found = violations(tmp_path)
    assert len(found) >= 1
    assert all(line.startswith(f"{where}:") and reason in line for line in found), found


SOUND = [
    ("klft/divergences.py", "import math\nimport torch\nfrom jaxtyping import Float"),
    ("klft/estimators.py", "from klft.divergences import gap\nimport torch.distributed"),
    ("klft/heads.py", "from klft.models import base_of\nfrom klft.parallel import placed"),
    ("klft/scoring.py", "from klft.references import resolve_reference\nfrom klft.prompts import Encoded"),
    ("klft/fused/triton_backend.py", "import triton\nfrom .torch_backend import x\nfrom klft.fused import y"),
    ("klft/fused/__init__.py", "from klft.fused.torch_backend import x"),
    (
        "klft/references/frozen.py",
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from peft import PeftModel",
    ),
    ("klft/references/frozen.py", "def f():\n    from transformers import AutoModel"),
    ("klft/prompts.py", "def f():\n    from trl import apply_chat_template"),
    ("klft/ppo/tokens.py", "from klft.diagnostics import TokenKLLog"),
    ("klft/ppo/trainer.py", "from .losses import x\nfrom klft.penalty import KLPenalty"),
    ("klft/integrations/grpo.py", "from transformers import Trainer\nfrom trl import TrlParser\nimport accelerate"),
    ("klft/cli.py", "import rich\nimport klft\nfrom klft import reverse_kl\nfrom klft.ppo import PPOTrainer"),
    ("klft/__init__.py", "from klft.masked import masked_mean"),
    (
        "recipes/a.py",
        "from klft import PPOConfig, reverse_kl\nfrom klft.integrations import KLReward\nimport klft\nklft.k1",
    ),
]


@pytest.mark.parametrize(("where", "text"), SOUND)
def test_a_sound_tree_is_not(tmp_path, where, text):
    path = tmp_path / where
    path.parent.mkdir(parents=True)
    path.write_text(text + "\n")
    assert violations(tmp_path) == []


LOADERS = {"from_pretrained", "pipeline"}


def silent_loads(root):
    """Calls that load something and do not say trust_remote_code, as "file:line: call": transformers would then ask on
    stdin, and a "y" there runs a repository's code. PEFT runs none."""
    found = []
    for path in [path for folder in ("klft", "recipes", "examples", "benchmarks") for path in sources(root / folder)]:
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.Call):
                continue
            *_, called = ast.unparse(node.func).split(".")
            said = {keyword.arg for keyword in node.keywords}
            if called in LOADERS and "trust_remote_code" not in said and "Peft" not in ast.unparse(node.func):
                found.append(f"{path.relative_to(root)}:{node.lineno}: {ast.unparse(node.func)}")
    return found


def test_whatever_loads_says_trust_remote_code():
    assert silent_loads(ROOT) == []


@pytest.mark.parametrize(
    ("text", "silent"),
    [
        ("AutoTokenizer.from_pretrained(name)", True),
        ("hf.AutoModel.from_pretrained(name, **options)", True),
        ("pipeline('text-generation', model)", True),
        ("AutoModel.from_pretrained(name, trust_remote_code=False, **options)", False),
        ("PeftConfig.from_pretrained(name)", False),
    ],
)
def test_a_load_that_says_nothing_is_reported(tmp_path, text, silent):
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes/a.py").write_text(text + "\n")
    assert [line.startswith("recipes/a.py:1: ") for line in silent_loads(tmp_path)] == [True] * silent


def borrowings(tests):
    """Imports of one test file by another, as "file:line: module": what they share belongs in support."""
    return [
        f"{path.relative_to(tests)}:{line}: {name}"
        for path in sources(tests)
        for name, line, _ in imports(path)
        if any(part.startswith("test_") for part in name.split("."))
    ]


def test_no_test_file_imports_another():
    assert borrowings(ROOT / "tests") == []


@pytest.mark.parametrize(
    "text",
    [
        "from test_b import helper",
        "import test_b as b",
        "from fused import test_b",
        "from tests.fused.test_b import helper",
        "def test_x():\n    import test_b",
        "from importlib import import_module\nimport_module('test_b')",
    ],
)
def test_a_test_file_that_imports_another_is_reported(tmp_path, text):
    for name, content in (("fused/test_a.py", text), ("test_b.py", "from support.fused import weights")):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(content + "\n")
    (found,) = borrowings(tmp_path)
    assert found.startswith("fused/test_a.py:")
    assert "test_b" in found


# --- sizes -----------------------------------------------------------------------------------------------------------


def code_lines(path):
    """Lines that hold code: not blank, not only a comment, not a docstring."""
    tree = ast.parse(path.read_text())
    docstrings = set()
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            first = node.body[0] if node.body else None
            if (
                isinstance(first, ast.Expr)
                and isinstance(first.value, ast.Constant)
                and isinstance(first.value.value, str)
            ):
                docstrings.update(range(first.lineno, first.end_lineno + 1))
    blank = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}
    lines = set()
    with path.open("rb") as file:
        for token in tokenize.tokenize(file.readline):
            if token.type not in blank and token.type != tokenize.ENCODING:
                lines.update(range(token.start[0], token.end[0] + 1))
    return len(lines - docstrings)


def test_code_lines_counts_code(tmp_path):
    path = tmp_path / "m.py"
    path.write_text(
        '"""Doc\n\nstring."""\n\n# comment\nx = """a\n\nb"""\n\n\ndef f():\n    "doc"\n    return x  # why\n'
    )
    assert code_lines(path) == 5  # x over three lines, def, return


def test_the_whole_house_stays_small():
    assert 0 < sum(map(code_lines, sources(ROOT / "klft"))) < BUDGET


def long_pieces(folder):
    """Files of 500 lines and more, functions of 60 lines and more."""
    found = []
    for path in sources(folder):
        text = path.read_text()
        if text.count("\n") >= 500:
            found.append(f"{path.name}: {text.count(chr(10))} lines")
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and node.end_lineno - node.lineno + 1 >= 60:
                found.append(f"{path.name}: {node.name} has {node.end_lineno - node.lineno + 1} lines")
    return found


def test_files_and_functions_are_short():
    assert [
        piece for folder in ("klft", "recipes", "benchmarks", "tests") for piece in long_pieces(ROOT / folder)
    ] == []


def test_long_pieces_are_reported(tmp_path):
    (tmp_path / "a.py").write_text("x = 1\n" * 500)
    (tmp_path / "b.py").write_text("def f():\n" + "    x = 1\n" * 59)
    (tmp_path / "c.py").write_text("x = 1\n" * 499)
    (tmp_path / "d.py").write_text("def f():\n" + "    x = 1\n" * 58)
    assert long_pieces(tmp_path) == ["a.py: 500 lines", "b.py: f has 60 lines"]


def test_every_recipe_has_its_yaml():
    files = sorted((ROOT / "recipes").glob("*.py"))
    recipes = [
        path for path in files if '\nif __name__ == "__main__":' in path.read_text()
    ]  # the others are what recipes share
    assert recipes
    assert [path.name for path in recipes if not path.with_suffix(".yaml").is_file()] == []


# --- what an import loads --------------------------------------------------------------------------------------------


def test_import_klft_loads_nothing_heavy():
    heavy = ["transformers", "accelerate", "datasets", "trl", "pandas", "peft", "pyarrow"]
    loaded = f"[m for m in {heavy} if m in sys.modules], 'torch' in sys.modules"
    code = f"import sys, klft; print(klft.__file__); print({loaded})"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT).stdout
    file, loaded = out.strip().splitlines()
    assert Path(file) == Path(klft.__file__)
    assert loaded == "[] False", "not even torch, which `klft --help` can do without"


def test_every_public_name_exists_or_waits_for_its_module():
    for name in klft.__all__:
        assert getattr(klft, name) is not None
        assert name in dir(klft)
    assert len(set(klft.__all__)) == len(klft.__all__)
    with pytest.raises(AttributeError, match="no_such_name"):
        klft.no_such_name  # noqa: B018
