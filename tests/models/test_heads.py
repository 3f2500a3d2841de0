"""LMHead against the logits of the models it is read off, values and gradients, and forwards that compute none."""

import inspect
import re

import pytest
import torch
import transformers
from support import tiny
from support.heads import FAMILIES, IDS, V, build, hooks_of, llama, own, read
from torch import nn

from klft import heads
from klft.heads import LMHead
from klft.models import hidden_states, token_positions
from klft.ppo.value import attach_value_head, install_hooks, with_values
from klft.sharding import VocabShard

FP32 = {"mamba"}  # casts its logits, whatever it is given


def assert_same_gradients(mine, theirs, tolerance=1e-10):
    """Norm-wise; a parameter that the model's own logits do not reach may have a gradient of zero."""
    assert mine.keys() == theirs.keys()
    for name, gradient in theirs.items():
        if gradient is None:
            assert mine[name] is None or mine[name].count_nonzero() == 0, name
            continue
        assert (mine[name] - gradient).norm() <= tolerance * gradient.norm(), name
    assert sum(g is not None and bool(g.any()) for g in theirs.values()) >= len(theirs) // 2


# ---- models --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FAMILIES)
def test_head_and_hidden_states_give_the_models_own_logits_and_gradients(name):
    model = build(name, torch.float32 if name in FP32 else torch.float64)
    tolerances = (1e-6, 1e-5) if name in FP32 else (1e-12, 1e-10)
    logits, theirs = own(model)
    mine, found, head = read(model)
    assert (head.scale, head.softcap) == pytest.approx(FAMILIES[name][1])
    assert model not in heads._probed, "a class that klft knows needs no probe"
    assert head.vocab_size == V
    torch.testing.assert_close(mine, logits, rtol=tolerances[0], atol=tolerances[0])
    assert_same_gradients(found, theirs, tolerances[1])


def test_tables_say_what_the_installed_classes_do():
    """Between the head and the loss of every class klft claims to know stands what the tables say, nothing else."""
    does = {"times": r"logits \* ({0})", "over": r"logits / ({0})", "cap": r"tanh\(logits(?: / cap)?\)"}
    plain = r"self\.lm_head\(hidden_states(\.to\([\w.=]+\))?\)(\.float\(\)|\.contiguous\(\))?"
    claims = dict.fromkeys(heads._PLAIN.split())
    claims |= {name: (field, how) for field, how, classes in heads._AFTER for name in classes.split()}
    checked = 0
    for name, claim in claims.items():
        cls = getattr(transformers, f"{name}ForCausalLM", None) or getattr(transformers, f"{name}LMHeadModel", None)
        if cls is None:
            continue
        checked += 1
        code = re.sub(r'(?s)""".*?"""|#[^\n]*', "", inspect.getsource(cls.forward))
        text = re.split(r"loss = None|if labels is not None|return ", code[code.rindex("logits = self.lm_head") :])[0]
        assert re.search(plain, text), name
        rest = re.sub(plain, "logits", text)
        if claim is None:
            assert re.fullmatch(r"logits = logits\s*", rest), (name, rest)
            continue
        field, how = claim
        assert field in rest or f"self.{field}" in rest, (name, rest)
        assert re.search(does[how].format(rf"[\w.]*{field}|[\w.]*{field}"), rest) or "soft_cap(" in rest, (name, rest)
        assert how != "cap" or not re.search(r"logits \* (?!self\.config\.(final|output)_logit_soft|cap)", rest), rest
    assert checked > 60


def test_padding_on_the_left_and_the_last_logits_only():
    model = llama()
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    places = {"position_ids": token_positions(mask)}
    logits, theirs = own(model, attention_mask=mask, logits_to_keep=3, **places)
    mine, found, _ = read(model, attention_mask=mask, logits_to_keep=3)  # places tokens by the mask itself
    assert mine.shape == (2, 3, V)
    torch.testing.assert_close(mine, logits, rtol=1e-12, atol=1e-12)
    assert_same_gradients(found, theirs)


def test_activation_checkpointing_changes_nothing():
    model = llama().train()
    logits, theirs = own(model)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    mine, found, _ = read(model)
    torch.testing.assert_close(mine, logits, rtol=1e-12, atol=1e-12)
    assert_same_gradients(found, theirs)


def test_a_frozen_head_stays_frozen():
    model = llama()
    model.lm_head.requires_grad_(False)
    mine, found, head = read(model)
    assert not head.weight.requires_grad
    assert found["lm_head.weight"] is None
    assert found["model.norm.weight"].any()
    torch.testing.assert_close(mine, own(model)[0], rtol=1e-12, atol=1e-12)


def test_bf16_models_give_fp32_logits_nearer_to_the_truth_than_their_own():
    model = llama(torch.bfloat16)
    truth = LMHead.from_model(model.double())
    model.to(torch.bfloat16)
    with hidden_states(model) as kept, torch.no_grad():
        model(input_ids=IDS)
    head = LMHead.from_model(model)
    with torch.autocast("cpu", torch.bfloat16):
        logits = head.logits(kept.hidden)
    assert kept.hidden.dtype == torch.bfloat16
    assert logits.dtype == torch.float32
    exact = kept.hidden.double() @ truth.weight.T.to(torch.bfloat16).double()
    assert (logits - exact).abs().max() < 1e-5 < (model(input_ids=IDS).logits - exact).abs().max()


def test_state_values_ride_along():
    model = llama()
    attach_value_head(model)
    nn.init.normal_(model.v_head.weight)
    install_hooks(model)
    with with_values(model):
        expected = model(input_ids=IDS)
        with hidden_states(model) as kept:
            output = model(input_ids=IDS)
    assert torch.equal(output["state_values"], expected["state_values"])
    assert output["logits"].shape == (2, 0, V)
    torch.testing.assert_close(LMHead.from_model(model).logits(kept.hidden), expected["logits"])


# ---- hidden_states leaves no trace ---------------------------------------------------------------------------------


def test_no_trace_is_left_and_generate_is_unchanged():
    model = llama()
    before = hooks_of(model)

    def generated():
        return model.generate(IDS, attention_mask=torch.ones_like(IDS), do_sample=False, max_new_tokens=6)

    first = generated()
    with hidden_states(model) as kept:
        model(input_ids=IDS)
    assert hooks_of(model) == before
    assert torch.equal(generated(), first)
    assert model(input_ids=IDS).logits.shape == (2, 5, V)
    assert kept.hidden.shape == (2, 5, 16)


def test_no_trace_is_left_by_an_error():
    model = tiny.llama()
    before = hooks_of(model)
    with pytest.raises(ZeroDivisionError), hidden_states(model):
        raise ZeroDivisionError
    assert hooks_of(model) == before


def test_a_forward_that_never_comes_is_an_error():
    model = tiny.llama()
    before = hooks_of(model)
    with pytest.raises(RuntimeError, match="no forward of LlamaForCausalLM"), hidden_states(model):
        pass
    assert hooks_of(model) == before


# ---- the head itself -----------------------------------------------------------------------------------------------


def test_logits_are_the_formula():
    torch.manual_seed(0)
    hidden, weight, bias = torch.randn(2, 3, 4).double(), torch.randn(7, 4).double(), torch.randn(7).double()
    head = LMHead(weight, bias, scale=0.5, softcap=2.0)
    for i, j in ((0, 0), (1, 2)):
        for v in range(7):
            z = 0.5 * (sum(float(hidden[i, j, d] * weight[v, d]) for d in range(4)) + float(bias[v]))
            capped = 2.0 * torch.tanh(torch.tensor(z / 2.0, dtype=torch.float64))
            torch.testing.assert_close(head.logits(hidden)[i, j, v], capped, rtol=1e-13, atol=1e-13)


def test_cut_and_narrow_keep_gradients_on_the_whole_weight():
    torch.manual_seed(0)
    weight, bias = torch.randn(7, 4, requires_grad=True), torch.randn(7, requires_grad=True)
    hidden, head = torch.randn(3, 4), LMHead(weight, bias, 0.5, 2.0)
    cut = head.cut(5)
    assert (cut.vocab_size, cut.scale, cut.softcap) == (5, 0.5, 2.0)
    torch.testing.assert_close(cut.logits(hidden), head.logits(hidden)[:, :5])
    part = head.narrow(VocabShard(2, 6, 7))
    assert (part.vocab_size, len(part.weight), part.shard) == (7, 4, VocabShard(2, 6, 7))
    torch.testing.assert_close(part.logits(hidden), head.logits(hidden)[:, 2:6])
    part.logits(hidden).sum().backward()
    assert weight.grad[2:6].all()
    assert not weight.grad[[0, 1, 6]].any()
    assert bias.grad.ne(0).tolist() == [False, False, True, True, True, True, False]


@pytest.mark.parametrize(("start", "stop", "left"), [(0, 4, (0, 4)), (4, 7, (4, 5)), (6, 7, (5, 5))])
def test_cutting_a_part_cuts_what_lies_beyond(start, stop, left):
    part = LMHead(torch.randn(7, 4), torch.randn(7)).narrow(VocabShard(start, stop, 7, None, True))
    cut = part.cut(5)
    assert cut.shard == VocabShard(*left, 5, None, True)
    assert torch.equal(cut.weight, part.weight[: left[1] - left[0]])
    assert len(cut.bias) == len(cut.weight)


REFUSED = [
    (lambda: LMHead(torch.randn(7)), r"\[V, D\], got a Tensor torch.float32 \[7\]"),
    (lambda: LMHead(torch.zeros(7, 4, dtype=torch.int8)), "torch.int8"),
    (lambda: LMHead(torch.randn(7, 4), torch.randn(6)), r"\[7, 4\]\) does not fit bias torch.Size\(\[6\]\)"),
    (lambda: LMHead(torch.randn(7, 4), torch.randn(7, 1)), "does not fit"),
    (lambda: LMHead(torch.randn(7, 4), shard=VocabShard(0, 4, 7)), "does not fit"),
    (lambda: LMHead(torch.randn(7, 4), softcap=0.0), "softcap > 0 or None; got 1.0 and 0.0"),
    (lambda: LMHead(torch.randn(7, 4), softcap=-1.0), "softcap"),
    (lambda: LMHead(torch.randn(7, 4), softcap=float("nan")), "softcap"),
    (lambda: LMHead(torch.randn(7, 4), softcap=float("inf")), "softcap"),
    (lambda: LMHead(torch.randn(7, 4), scale=0.0), "scale"),
    (lambda: LMHead(torch.randn(7, 4), scale=float("nan")), "scale"),
    (lambda: LMHead(torch.randn(7, 4), scale=float("inf")), "scale"),
    (lambda: LMHead(torch.randn(7, 4)).cut(8), "expected 1 to 7 rows, got 8"),
    (lambda: LMHead(torch.randn(7, 4)).cut(0), "expected 1 to 7 rows, got 0"),
    (lambda: LMHead(torch.randn(7, 4)).narrow(VocabShard(0, 4, 8)), "vocab_size=8.*got 7 rows"),
    (lambda: LMHead(torch.randn(4, 4), shard=VocabShard(0, 4, 7)).narrow(VocabShard(0, 4, 7)), "needs a whole head"),
    (lambda: LMHead.from_model(llama(), shard_rows=True), "the head is whole here"),
]


@pytest.mark.parametrize(("make", "words"), REFUSED)
def test_what_does_not_fit_is_refused(make, words):
    with pytest.raises(ValueError, match=words):
        make()


def test_a_negative_scale_is_a_scale():
    assert LMHead(torch.ones(7, 4), scale=-1.0).logits(torch.ones(4)).tolist() == [-4.0] * 7
