"""What no source does: read a pickle, run text as code, start a shell, or open the network but where it is said."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FOLDERS = ("klft", "recipes", "examples", "benchmarks")
PICKLES = {"pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
NETWORK = {
    "requests", "urllib.request", "urllib3", "http.client", "http.server", "socket", "ssl", "ftplib", "smtplib",
    "telnetlib", "xmlrpc", "httpx", "aiohttp", "websockets", "webbrowser", "socketserver", "huggingface_hub",
    "sentry_sdk", "wandb", "posthog",
}  # fmt: skip
ALLOWED = {
    ("klft/hub.py", "huggingface_hub"),  # where its cache is
    ("klft/hub.py", "urllib.request"),  # does the hub answer? asked for a model that is not on this machine
    ("klft/cli.py", "webbrowser"),  # --open
    ("recipes/ppo_trackers.py", "wandb"),  # --report_to wandb
}
RUN = {"eval", "exec", "compile", "os.system", "os.popen"}
YAML = {"yaml.unsafe_load", "yaml.full_load", "yaml.unsafe_load_all", "yaml.full_load_all"}
SAFE = {"SafeLoader", "CSafeLoader", "yaml.SafeLoader", "yaml.CSafeLoader"}


def imported(node):
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom) and not node.level:
        return [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
    return []


def why_unsafe(call):
    """What is wrong with a call, or None."""
    name, given = ast.unparse(call.func), {each.arg: ast.unparse(each.value) for each in call.keywords}
    if name in RUN | YAML:
        return name
    if name == "torch.load" and given.get("weights_only") != "True":
        return "torch.load without weights_only=True"
    if name in ("yaml.load", "yaml.load_all", "yaml.compose"):
        loader = given.get("Loader", ast.unparse(call.args[1]) if len(call.args) > 1 else None)
        return None if loader in SAFE else f"{name} without a safe loader"
    return next((f"{each}={given[each]}" for each in ("shell", "allow_pickle") if given.get(each) == "True"), None)


def findings(root):
    """(file, what it does) of every such import and call."""
    found = set()
    for path in sorted(path for folder in FOLDERS for path in (root / folder).rglob("*.py")):
        file = path.relative_to(root).as_posix()
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and (why := why_unsafe(node)):
                found.add((file, why))
            for name in imported(node):
                found |= {(file, each) for each in PICKLES | NETWORK if f"{name}.".startswith(f"{each}.")}
    return found


def test_no_source_reads_pickles_runs_texts_or_opens_the_network():
    assert findings(ROOT) == ALLOWED


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("import pickle", "pickle"),
        ("def f():\n    from joblib import load", "joblib"),
        ("from urllib import request", "urllib.request"),
        ("from urllib.request import urlopen", "urllib.request"),
        ("import http.client as c", "http.client"),
        ("from huggingface_hub.utils import get_session", "huggingface_hub"),
        ("torch.load(path)", "torch.load without weights_only=True"),
        ("torch.load(path, weights_only=False)", "torch.load without weights_only=True"),
        ("np.load(path, allow_pickle=True)", "allow_pickle=True"),
        ("eval(text)", "eval"),
        ("os.system(text)", "os.system"),
        ("yaml.load(text)", "yaml.load without a safe loader"),
        ("yaml.load(text, yaml.UnsafeLoader)", "yaml.load without a safe loader"),
        ("yaml.load(text, Loader=Loader)", "yaml.load without a safe loader"),
        ("yaml.full_load(text)", "yaml.full_load"),
        ("subprocess.run(text, shell=True)", "shell=True"),
        ("torch.load(path, weights_only=True)", None),
        ("yaml.load(text, Loader=yaml.SafeLoader)", None),
        ("model.eval()\nre.compile(text)\ntorch.compile(model)", None),
        ("import urllib.error\nfrom urllib.parse import quote\nimport socketless", None),
    ],
)
def test_a_source_that_does_is_found(text, found, tmp_path):
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes/a.py").write_text(text)
    assert findings(tmp_path) == ({("recipes/a.py", found)} if found else set())
