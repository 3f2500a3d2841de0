"""Names of klft 0.1 still work, with a DeprecationWarning that names the new one; and how long an import takes."""

import importlib
import os
import subprocess
import sys

import pytest
import torch

import klft

OLD = [
    ("klft.heads", "hidden_states", "klft.models.hidden_states"),
    ("klft.reference", "FrozenReference", "klft.references.FrozenReference"),
    ("klft.reference", "AdapterReference", "klft.references.AdapterReference"),
    ("klft.reference", "causal_inputs", "klft.models.causal_inputs"),
    ("klft.reference", "evaluating", "klft.models.evaluating"),
    ("klft.cli", "parse_arguments", "klft.arguments.parse_arguments"),
    ("klft.cli", "fits", "klft.arguments.fits"),
    ("klft.diagnostics.measure", "encode_texts", "klft.prompts.encode_texts"),
    ("klft.diagnostics.measure", "score_texts", "klft.scoring.score_texts"),
    ("klft.diagnostics.measure", "as_reference", "klft.references.resolve_reference"),
    ("klft.diagnostics.measure", "check_tokenizers", "klft.models.check_tokenizers"),
    ("klft.diagnostics.sources", "load_models", "klft.diagnostics.loading.load_models"),
    ("klft.diagnostics.sources", "read_texts", "klft.diagnostics.loading.read_texts"),
    ("klft.diagnostics.texts", "token_texts", "klft.diagnostics.vocabulary.token_texts"),
]


@pytest.mark.parametrize(("module", "name", "new"), OLD, ids=lambda each: each)
def test_an_old_name_is_the_new_one_and_says_so(module, name, new):
    place, _, attribute = new.rpartition(".")
    with pytest.warns(DeprecationWarning, match=rf"{module}\.{name} is deprecated: use {new}$"):
        old = getattr(importlib.import_module(module), name)
    assert old is getattr(importlib.import_module(place), attribute)


def test_names_that_never_were_are_no_attributes():
    for module in {module for module, _, _ in OLD}:
        with pytest.raises(AttributeError, match="no_such_name"):
            importlib.import_module(module).no_such_name  # noqa: B018


def test_names_that_stayed_do_not_warn():
    from klft.cli import check_writable, one_line_errors  # noqa: F401
    from klft.diagnostics import TokenKLCallback, score_texts, visible, write_report  # noqa: F401
    from klft.fused import TokenScores  # noqa: F401
    from klft.penalty import score_logits  # noqa: F401


def test_the_old_keyword_of_estimate_kl():
    logp, ref_logp = torch.tensor([-1.0, -2.0]), torch.tensor([-1.5, -1.0])
    with pytest.warns(DeprecationWarning, match="use estimator="):
        old = klft.estimate_kl(logp, ref_logp, value="k3")
    assert torch.equal(old, klft.estimate_kl(logp, ref_logp, estimator="k3"))


def cpu_seconds(*command):
    """Of the thriftiest of three runs. Not the time that passes: other processes, such as other tests, take theirs."""
    spent = []
    for _ in range(3):
        before = os.times()
        subprocess.run([sys.executable, *command], check=True, capture_output=True)
        after = os.times()
        spent.append(after.children_user + after.children_system - before.children_user - before.children_system)
    return min(spent)


def test_help_is_there_at_once():
    assert cpu_seconds("-m", "klft.cli", "--help") < 0.3


def test_importing_klft_takes_no_longer_than_torch():
    """What klft takes on top of torch, measured in one process."""
    code = "import time, torch; start = time.process_time(); import klft; klft.reverse_kl"
    code += "; print(time.process_time() - start)"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert float(done.stdout) < 0.2
