"""A vocabulary split over 1, 2 and 3 real processes (gloo): values and gradients of the dense float64 result.

Run as a script, this file is what each of three processes does: all cases over all three, then over the group of two
or of one that it belongs to; results as a file. The dense result is computed by the test, for the whole vocabulary.
"""

import itertools
import os
import subprocess
import sys
import traceback
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path

import conftest  # noqa: F401 - also for the script: few threads
import pytest
import torch
import torch.distributed as dist
from support.fused import (
    CONSTANT,
    DIFFERENTIABLE,
    EVERYTHING,
    EXACT,
    LOSSES,
    MANY,
    dense_divergence,
    dense_loss,
    dense_scores,
    limits,
    mix,
    our_divergence,
    our_loss,
    our_scores,
    weights,
)
from support.oracles import dead_words, two_heads, value_and_gradients
from support.precision import assert_never_worse, plain, pooled, several
from support.processes import environment

from klft.sharding import VocabShard

GROUPS = {1: [0], 2: [1, 2], 3: [0, 1, 2]}  # who makes up a world of that size
TOKENS = 5
KINDS = {2: "bias", 7: "all", 129: "bias"}  # fewer words than processes; no even split; many tiles
POISONED = 1  # the token whose hidden state is NaN where a case says so; it has no weight in any loss


# ---- cases: the same numbers in every process --------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """What is computed, over how many words, whose tokens."""

    what: str  # a divergence, "scores", or the name of a loss after "loss "
    vocab: int = 7
    own_tokens: bool = False
    special: str = ""
    params: tuple[float, ...] = ()

    def __str__(self):
        parts = [self.what, *self.params, f"V{self.vocab}", "own" if self.own_tokens else "same", self.special]
        return "-".join(str(part) for part in parts if part != "")


RENYI = {"what": "renyi_divergence", "params": (0.5,)}
ONE_OF_EACH = (RENYI, {"what": "scores"}, {"what": "loss clipped_ratio"})
SPECIALS = (
    "one tile", "sharded reference", "first shard dead", "last shard dead", "uneven rows", "NaN token",
    "frozen weight", "frozen hidden", "all tokens on one rank", "no tokens", "own factors",
)  # fmt: skip
RENYIS = ("first shard dead", "last shard dead", "NaN token")  # where its logsumexp may stumble; scores do for the rest
SHARED = [Case(own_tokens=own, **one) for one in ONE_OF_EACH for own in (False, True)]


def applies(special, case):
    if special == "own factors":  # of a loss; the other functions have a weight per token
        return case.what.startswith("loss ")
    return not case.params or special in RENYIS


CASES = [
    *(Case(name, own_tokens=own, params=params) for name, params in MANY for own in (False, True)),
    *(Case("scores", own_tokens=own) for own in (False, True)),
    *(Case(f"loss {name}", own_tokens=own) for name in LOSSES for own in (False, True)),
    *(replace(case, vocab=vocab) for vocab in (2, 129) for case in SHARED),
    *(replace(case, special=name) for name in SPECIALS for case in SHARED if applies(name, case)),
]
IN_FP32 = ("reverse_kl", "forward_kl", "entropy")
NAMES = ("hidden", "weight", "bias")


def dealt(case, world):
    """(start, stop) of each rank's words."""
    if case.special == "uneven rows":
        return {1: [(0, 7)], 2: [(0, 1), (1, 7)], 3: [(0, 5), (5, 5), (5, 7)]}[world]
    each = -(-case.vocab // world)
    return [(min(r * each, case.vocab), min((r + 1) * each, case.vocab)) for r in range(world)]


def tokens_of(case, world):
    """Each rank's tokens. Of three ranks, one has none."""
    count = 0 if case.special == "no tokens" else TOKENS
    if not case.own_tokens:
        return [slice(0, count)] * world
    ends = {1: [0, 5], 2: [0, 4, 5], 3: [0, 3, 3, 5]}[world]
    if case.special == "all tokens on one rank":
        ends = [0] * world + [5]
    return [slice(min(a, count), min(b, count)) for a, b in itertools.pairwise(ends)]


def alive(case, world):
    """The words that the models can say."""
    words = torch.arange(case.vocab)
    if "dead" not in case.special:
        return words
    start, stop = dealt(case, world)[0 if "first" in case.special else -1] if world > 1 else (2, 5)
    return words[(words < start) | (words >= stop)]


def numbers(case, world):
    """All tokens over all words; their weights, and what a loss is given per token."""
    two = two_heads(TOKENS, case.vocab, "bias" if "dead" in case.special else KINDS[case.vocab], seed=case.vocab)
    words = alive(case, world)
    if "dead" in case.special:
        two = dead_words(two, ~torch.isin(torch.arange(case.vocab), words))
        two.token_ids = words[two.token_ids % len(words)]
    weight = weights(TOKENS)
    if case.special == "NaN token":
        two.hidden[POISONED], weight[POISONED] = torch.nan, 0.0
    old_logp = torch.linspace(-3, -1, TOKENS, dtype=torch.float64)
    return two, weight, (old_logp, weights(TOKENS), torch.arange(TOKENS) != POISONED)


def factor(case, rank):
    """What a process multiplies its loss with: mostly all the same."""
    return -3.7 * (1 + rank if case.special == "own factors" and case.own_tokens else 1)


def result(case, two, weight, per_token, rank=0, ours=False):
    """A function of the policy's tensors and the weight of its value: dense, or ours."""
    if case.what == "scores":
        return lambda *leaves: mix(dense_scores(two, *leaves)), weight
    if case.what.startswith("loss "):
        loss = LOSSES[case.what.removeprefix("loss ")]
        return (our_loss if ours else dense_loss)(two, loss, per_token), factor(case, rank)
    return (our_divergence if ours else dense_divergence)(two, case.what, *case.params), weight


# ---- what each process does --------------------------------------------------------------------------------------


def shard_of(case, rank, world, group):
    if case.special == "uneven rows":
        return VocabShard(*dealt(case, world)[rank], case.vocab, group, case.own_tokens)
    return VocabShard.even(case.vocab, group, case.own_tokens)


def frozen(case, name, tensor):
    """Which of the policy's tensors want no gradient: also the hidden states of a process that has no tokens, once."""
    bare = case.special == "all tokens on one rank" and name == "hidden" and not len(tensor)
    return bare or case.special == f"frozen {name}"


def found(case, rank, world, group):
    """This rank's values and gradients, from its own rows and its own tokens."""
    two, weight, per_token = numbers(case, world)
    shard, mine = shard_of(case, rank, world, group), tokens_of(case, world)[rank]
    assert (shard.start, shard.stop) == dealt(case, world)[rank]
    rows = slice(shard.start, shard.stop)
    local = replace(
        two.tokens(mine), weight=two.weight[rows], bias=None if two.bias is None else two.bias[rows],
        options=two.options | {"shard": shard},
    )  # fmt: skip
    if case.special == "sharded reference":
        local.ref_weight, local.ref_bias = two.ref_weight[rows], two.ref_bias[rows]
        local.ref_options = two.ref_options | {"shard": shard}
    tile = EVERYTHING if case.special == "one tile" else 2 * -(-case.vocab // world)
    table, kind, changed = limits(tile_logits=tile, block_logits=tile // 2)  # a tile in two blocks
    table[kind] = changed
    leaves = [x.clone().requires_grad_(not frozen(case, n, x)) for n, x in zip(NAMES, local.leaves, strict=False)]
    weight, per_token = weight[mine], [x[mine] for x in per_token]
    if case.what == "scores":
        scores = our_scores(local, *leaves, top_k=min(3, case.vocab))
        value = mix(scores)
    else:
        scores = None
        fn, weight = result(case, local, weight, per_token, rank, ours=True)
        value = fn(*leaves)
    (value * weight).sum().backward()
    out = {"value": value.detach(), **{name: leaf.grad for name, leaf in zip(NAMES, leaves, strict=False)}}
    detached = lambda x: x if x is None else x.detach()
    return out | {"scores": {name: detached(x) for name, x in vars(scores).items()} if scores else None}


def equal_models(own_tokens, rank, world, group):
    """Two heads with the same numbers in fp32: the largest score that says they differ."""
    two = two_heads(TOKENS, 129, "all", ref_dim=5).to(torch.float32)
    case = Case("scores", 129, own_tokens)
    shard = VocabShard.even(129, group, own_tokens)
    rows, mine = slice(shard.start, shard.stop), tokens_of(case, world)[rank]
    options = two.options | {"shard": shard}
    two = replace(
        two.tokens(mine), weight=two.weight[rows], bias=two.bias[rows], options=options,
        ref_hidden=two.hidden[mine].clone(), ref_weight=two.weight.clone(), ref_bias=two.bias, ref_options=two.options,
    )  # fmt: skip
    scores = our_scores(two, *two.leaves)
    return torch.cat(
        [scores.reverse_kl, scores.forward_kl, (scores.logp - scores.ref_logp).abs(), 1.0 - scores.top1_agree.float()]
    )


def in_fp32(name, rank, world, group):
    """Values and gradients of a few seeds, in the precision that rounds what the ranks tell each other."""
    shard, runs = VocabShard.even(256, group), []
    table, kind, changed = limits(tile_logits=EVERYTHING)
    table[kind] = changed
    for two, _ in several(1e-2, torch.float32):
        two = replace(two, weight=two.weight[shard.start : shard.stop], options={"shard": shard})
        runs.append(value_and_gradients(our_divergence(two, name), two.leaves))
    return runs


def worker(folder, rank):
    dist.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=3, timeout=timedelta(seconds=60))
    groups = {world: dist.new_group(members) for world, members in GROUPS.items()}
    results = {}
    try:
        for world in (3, 2, 1):
            if rank not in GROUPS[world]:
                continue
            here = (GROUPS[world].index(rank), world, groups[world] if world < 3 else None)
            for case in CASES:
                results[world, str(case)] = found(case, *here)
            for own_tokens in (False, True):
                results[world, own_tokens] = equal_models(own_tokens, *here)
            for name in IN_FP32:
                results[world, f"{name} in fp32"] = in_fp32(name, *here)
    except Exception:
        results["error"] = traceback.format_exc()
    torch.save(results, folder / f"{rank}.pt")
    if "error" in results:
        os._exit(1)  # the others may be waiting in a collective
    dist.destroy_process_group()


# ---- the tests ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """What each process of a world found, by case."""
    folder = tmp_path_factory.mktemp("three")
    processes = [
        subprocess.Popen(
            [sys.executable, __file__, str(folder), str(rank)],
            env=environment(OMP_NUM_THREADS="1"), stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
        )
        for rank in range(3)
    ]  # fmt: skip
    try:
        errors = "\n".join(p.communicate(timeout=300)[1] for p in processes)
    finally:
        for p in processes:
            p.kill()
    paths = [folder / f"{rank}.pt" for rank in range(3)]
    of_all = [torch.load(p, weights_only=False) if p.exists() else {"error": errors[-6000:]} for p in paths]

    def results(world, name):
        for rank in GROUPS[world]:
            assert (world, name) in of_all[rank], f"rank {rank} did not get there: {of_all[rank].get('error')}"
        return [of_all[rank][world, name] for rank in GROUPS[world]]

    return results


def compare(case, world, results):
    """The dense models over all words, for each process's tokens: values of its own, gradients of all losses."""
    two, weight, per_token = numbers(case, world)
    words, mine = alive(case, world), tokens_of(case, world)
    count = max(own.stop for own in mine)
    sums = [torch.zeros(count, 5).double(), *(torch.zeros_like(x) for x in two.leaves[1:])]
    for rank, own in enumerate(mine):
        kept = [t for t in range(own.start, own.stop) if case.special != "NaN token" or t != POISONED]
        part = two.tokens(kept).vocabulary(words)
        fn, scale = result(case, part, weight[kept], [x[kept] for x in per_token], rank)
        value, *gradients = value_and_gradients(fn, part.leaves, scale)
        if case.own_tokens or rank == 0:
            for total, index, gradient in zip(sums, (kept, words, words), gradients, strict=False):
                total[index] += gradient
        counted = [t - own.start for t in kept]
        if not case.what.startswith("loss "):
            assert results[rank]["value"].shape == (own.stop - own.start,)
            torch.testing.assert_close(results[rank]["value"][counted], value, **EXACT)
        else:
            torch.testing.assert_close(results[rank]["value"], value, **EXACT)
        if case.what == "scores":
            compare_scores(part, words, counted, results[rank]["scores"])
    for rank, (own, rows) in enumerate(zip(mine, dealt(case, world), strict=True)):
        for name, total, cut in zip(NAMES, sums, (own, slice(*rows), slice(*rows)), strict=False):
            gradient = results[rank][name]
            if frozen(case, name, total[cut]):
                assert gradient is None
            else:
                where = f"{name} on rank {rank}: "
                torch.testing.assert_close(gradient, total[cut], **EXACT, msg=lambda m, w=where: w + m)


def compare_scores(two, words, counted, scores):
    truth = dense_scores(two, *two.leaves)
    for field in (*DIFFERENTIABLE, *CONSTANT):
        torch.testing.assert_close(scores[field][counted].double(), getattr(truth, field), **EXACT, msg=field)
    k = min(3, len(words))
    for side, logits in {"": two.logits(*two.leaves), "ref_": two.ref_logits}.items():
        top = torch.softmax(logits, -1).topk(k)
        torch.testing.assert_close(scores[f"{side}top_p"][counted, :k], top.values, **EXACT)
        assert torch.equal(scores[f"{side}top_ids"][counted, :k], words[top.indices])


@pytest.mark.parametrize("world", GROUPS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_ranks_find_the_dense_result(case, world, ranks):
    compare(case, world, ranks(world, str(case)))


@pytest.mark.parametrize("world", GROUPS)
@pytest.mark.parametrize("own_tokens", [False, True])
def test_equal_models_have_no_divergence_on_any_rank(own_tokens, world, ranks):
    for differences in ranks(world, own_tokens):
        assert not differences.any()


@pytest.mark.parametrize("world", GROUPS)
@pytest.mark.parametrize("name", IN_FP32)
def test_ranks_are_never_worse_than_naive(name, world, ranks):
    of_ranks = ranks(world, f"{name} in fp32")
    of_seeds = zip(*of_ranks, strict=True)
    ours = pooled([run[0][0], run[0][1], torch.cat([weight for _, _, weight in run])] for run in of_seeds)
    pairs = several(1e-2, torch.float32)
    other = pooled(value_and_gradients(plain(two, name), two.leaves) for two, _ in pairs)
    truth = pooled(value_and_gradients(dense_divergence(exact, name), exact.leaves) for _, exact in pairs)
    assert_never_worse(ours, other, truth)


if __name__ == "__main__":
    worker(Path(sys.argv[1]), int(sys.argv[2]))
