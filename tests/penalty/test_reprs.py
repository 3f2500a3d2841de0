"""What an object says of itself: one line, with what a person who debugs needs; it never raises, gathers or computes
more than a mean."""

import copy

import peft
import pytest
import torch
from support import tiny
from support.penalties import GivenReference
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode

import klft
from klft import (
    AdapterReference,
    AdaptiveKL,
    CachedReference,
    EMAReference,
    FixedKL,
    FrozenReference,
    KLPenalty,
    LMHead,
    MixtureReference,
    PIController,
    ScheduledKL,
    TargetKL,
    TokenKL,
    TokenScores,
    TopKReference,
    VocabShard,
)
from klft.token_rules import burn_in

BODY = "5,712 parameters, torch.float32, cpu"


def measured(**options):
    """(penalty, TokenKL) of two texts, of which one has a token less."""
    penalty = KLPenalty(tiny.llama(5), **options)
    ids = torch.randint(3, tiny.VOCABULARY, (2, 7), generator=torch.Generator().manual_seed(0))
    mask = torch.arange(7) >= torch.tensor([[3], [4]])
    return penalty, penalty.measure(tiny.llama(0).eval()(ids).logits, ids, torch.ones_like(ids), mask)


def test_controllers():
    assert repr(FixedKL(0.05)) == "FixedKL(coef=0.05)"
    assert repr(AdaptiveKL(0.05, 6.0, 10_000)) == "AdaptiveKL(coef=0.05, target=6, horizon=10000)"
    assert repr(TargetKL(0.1, 6.0)) == "TargetKL(coef=0.1, target=6, tolerance=1.5, factor=2)"
    scheduled = ScheduledKL(0.2, 0.1, 100, "cosine")
    scheduled.update(1.0, 100)
    assert repr(scheduled) == "ScheduledKL(start=0.2, end=0.1, episodes=100, shape='cosine', coef=0.1, seen=100)"
    assert repr(PIController(0.1, 6.0)) == "PIController(initial=0.1, target=6, kp=0.1, ki=0.02, coef=0.1, integral=0)"


def test_a_penalty_says_what_it_penalises_where_and_against_what():
    penalty = KLPenalty(tiny.llama(5), controller=AdaptiveKL(0.05, 6.0, 10_000))
    reference = f"FrozenReference(LlamaForCausalLM, {BODY}, placement='replicated')"
    controller = "AdaptiveKL(coef=0.05, target=6, horizon=10000)"
    assert repr(penalty) == f"KLPenalty(reverse KL, k1 in reward, {controller}, {reference})"
    other = KLPenalty(
        tiny.llama(5), coef=0.1, estimator="exact", placement="both", divergence="jsd", clip=3.0,
        divergence_kwargs={"weight": 0.3}, token_rule=burn_in(4),
    )  # fmt: skip
    said = "jsd, weight=0.3, exact in both, FixedKL(coef=0.1), clip=3.0, token_rule=burn_in(4)"
    assert repr(other) == f"KLPenalty({said}, {reference})"


def test_scores_say_which_fields_are_there():
    scores = TokenScores(torch.zeros(5), reverse_kl=torch.zeros(5))
    assert repr(scores) == "TokenScores([5], torch.float32, cpu: logp, reverse_kl)"


@pytest.mark.parametrize("rule", [None, lambda ids, mask, scores: torch.arange(7.0).expand_as(scores.logp)])
def test_a_kl_says_the_mean_that_is_logged(rule):
    _, kl = measured(token_rule=rule)
    logged = klft.kl_metrics(kl.scores, kl.mask, weight=kl.weight)
    assert kl.metrics() == logged
    means = ", ".join(f"{name}_kl {logged[f'kl/{name}/mean']:.4g}" for name in ("reverse", "forward"))
    assert repr(kl) == f"TokenKL([2, 7], torch.float32, cpu, 7 of 14 tokens count, mean nats: {means})"


def test_a_kl_of_sampled_scores_alone_and_one_of_no_token():
    logp = torch.tensor([-1.0, -2.0, torch.nan])
    kl = TokenKL(TokenScores(logp, ref_logp=logp - 0.5), torch.tensor([True, True, False]))
    assert repr(kl) == "TokenKL([3], torch.float32, cpu, 2 of 3 tokens count, mean nats: k1 0.5)"
    none = TokenKL(kl.scores, torch.zeros(3, dtype=torch.bool))
    assert repr(none) == "TokenKL([3], torch.float32, cpu, 0 of 3 tokens count, mean nats: none)"
    assert repr(TokenKL(TokenScores(logp), kl.mask)).endswith("mean nats: none)")


def test_a_kl_is_not_traced_by_its_repr():
    _, kl = measured()
    assert kl.scores.reverse_kl.requires_grad
    before = torch.is_grad_enabled()
    assert "reverse_kl" in repr(kl)
    assert torch.is_grad_enabled() == before


def test_heads():
    weight = torch.zeros(6, 4, dtype=torch.bfloat16)
    assert repr(LMHead(weight)) == "LMHead(6 x 4, torch.bfloat16, cpu)"
    shard = VocabShard(6, 12, 20)
    head = LMHead(weight, torch.zeros(6), scale=0.5, softcap=30.0, shard=shard)
    assert repr(head) == "LMHead(20 x 4, rows 6 to 12, bias, torch.bfloat16, cpu, scale=0.5, softcap=30)"


def test_references(tmp_path):
    frozen = FrozenReference(tiny.llama(5))
    policy = peft.get_peft_model(tiny.llama(0), tiny.lora())
    assert repr(AdapterReference(policy)).endswith("parameters, torch.float32, cpu, adapter=None)")
    assert repr(EMAReference(tiny.llama(0), 0.9, 4)) == (
        f"EMAReference(LlamaForCausalLM, {BODY}, decay=0.9, every=4, steps=0)"
    )
    assert repr(MixtureReference([(0.3, frozen), (1, GivenReference())])).startswith(
        f"MixtureReference(0.3 * FrozenReference(LlamaForCausalLM, {BODY}, placement='replicated') + 1 * <"
    )
    ids = torch.tensor([[3, 4, 5], [6, 7, 8]])
    cached = CachedReference.write(tmp_path / "cache", frozen, [(ids, torch.ones_like(ids))])
    at = str(tmp_path / "cache")
    assert (
        repr(cached) == f"CachedReference('LlamaForCausalLM' in {at!r}, 2 texts, LMHead(32 x 16, torch.float32, cpu))"
    )
    top = TopKReference(torch.tensor([[[3, 4]]]), torch.tensor([[[-1.0, -2.0]]]), torch.tensor([[-1.0]]))
    assert repr(top) == "TopKReference(ids [1, 1, 2], torch.float32, cpu)"
    frozen.model.config._name_or_path = "my/model\n\x1b[31m"
    assert "LlamaForCausalLM 'my/model\\n\\x1b[31m', 5,712" in repr(frozen)


TYPES = [
    FixedKL, AdaptiveKL, KLPenalty, LMHead, TokenScores, TokenKL, FrozenReference, AdapterReference, EMAReference,
    CachedReference, MixtureReference, TopKReference,
]  # fmt: skip


@pytest.mark.parametrize("kind", TYPES, ids=lambda kind: kind.__name__)
def test_a_half_built_object_has_a_repr(kind):
    assert repr(object.__new__(kind)) in (f"{kind.__name__}(...)", f"{kind.__name__}()")


def test_meta_tensors_have_no_mean():
    logp = torch.zeros(2, 3, device="meta")
    kl = TokenKL(TokenScores(logp, reverse_kl=logp), logp == 0)
    assert repr(kl) == "TokenKL([2, 3], torch.float32, meta)"
    assert repr(kl.scores) == "TokenScores([2, 3], torch.float32, meta: logp, reverse_kl)"
    assert repr(LMHead(logp)) == "LMHead(2 x 3, torch.float32, meta)"
    reference = FrozenReference(copy.deepcopy(tiny.llama(5)).to("meta"))
    assert "5,712 parameters" in repr(reference)


def test_a_rule_of_several_lines_is_one_line():
    class Rule:
        def __call__(self, token_ids, mask, scores):
            return mask.float()

        def __repr__(self):
            return "a rule\nof two lines"

    penalty = KLPenalty(tiny.llama(5), token_rule=Rule())
    assert "token_rule=a rule of two lines" in repr(penalty)
    assert "\n" not in repr(penalty)


class Broken(FixedKL):
    def __repr__(self):
        raise RuntimeError("no repr")


def test_a_repr_never_raises():
    assert repr(KLPenalty(tiny.llama(5), controller=Broken(0.1))) == "KLPenalty(...)"


@pytest.fixture
def one_process():
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    torch.distributed.destroy_process_group()


def test_what_is_sharded_is_not_gathered(one_process):
    logp = distribute_tensor(torch.zeros(4, 6), one_process, [Shard(0)])
    reference = FrozenReference(fully_shard(tiny.llama(5), mesh=one_process))
    with CommDebugMode() as collectives:
        assert repr(TokenKL(TokenScores(logp), logp == 0)) == "TokenKL([4, 6], torch.float32, cpu)"
        assert "5,712 parameters, torch.float32, cpu" in repr(reference)
    assert collectives.get_total_counts() == 0
