"""A vocabulary split over 1, 2 and 3 real processes (gloo): values and gradients of the dense float64 result.

Run as a script, this file is what each of the processes does: all cases in one process group, results as a file. The
dense result is computed by the test, for all tokens and the whole vocabulary at once.
"""

import itertools
import os
import subprocess
import sys
import traceback
from dataclasses import dataclass, replace
from datetime import timedelta
from functools import cache
from pathlib import Path

import conftest  # noqa: F401 - also for the script: few threads
import pytest
import torch
import torch.distributed as dist
from oracles import two_heads, value_and_gradients
from test_fused import (
    CONSTANT,
    DIFFERENTIABLE,
    EVERYTHING,
    EXACT,
    LOSSES,
    MANY,
    dead_words,
    dense_divergence,
    dense_loss,
    dense_scores,
    mix,
    our_divergence,
    our_loss,
    our_scores,
    weights,
)

from klft import fused
from klft.fused import torch_backend
from klft.sharding import VocabShard

WORLDS = (1, 2, 3)
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
    "frozen weight", "frozen hidden", "all tokens on one rank", "no tokens",
)  # fmt: skip
RENYIS = ("first shard dead", "last shard dead", "NaN token")  # where its logsumexp may stumble; scores do for the rest
SHARED = [Case(own_tokens=own, **one) for one in ONE_OF_EACH for own in (False, True)]
CASES = [
    *(Case(name, own_tokens=own, params=params) for name, params in MANY for own in (False, True)),
    *(Case("scores", own_tokens=own) for own in (False, True)),
    *(Case(f"loss {name}", own_tokens=own) for name in LOSSES for own in (False, True)),
    *(replace(case, vocab=vocab) for vocab in (2, 129) for case in SHARED),
    *(replace(case, special=name) for name in SPECIALS for case in SHARED if not case.params or name in RENYIS),
]
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


def result(case, two, weight, per_token, ours=False):
    """A function of the policy's tensors and the weight of its value: dense, or ours."""
    if case.what == "scores":
        return lambda *leaves: mix(dense_scores(two, *leaves)), weight
    if case.what.startswith("loss "):
        loss = LOSSES[case.what.removeprefix("loss ")]
        constant = torch.tensor(-3.7, dtype=torch.float64)
        return (our_loss if ours else dense_loss)(two, loss, per_token), constant
    return (our_divergence if ours else dense_divergence)(two, case.what, *case.params), weight


# ---- what each process does --------------------------------------------------------------------------------------


def shard_of(case, rank, world, group):
    if case.special == "uneven rows":
        return VocabShard(*dealt(case, world)[rank], case.vocab, group, case.own_tokens)
    return VocabShard.even(case.vocab, group, case.own_tokens)


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
    fused.CPU_TILE = EVERYTHING if case.special == "one tile" else 2 * -(-case.vocab // world)
    torch_backend.CPU_BLOCK = fused.CPU_TILE // 2  # a tile in two passes
    leaves = [
        x.clone().requires_grad_(case.special != f"frozen {n}") for n, x in zip(NAMES, local.leaves, strict=False)
    ]
    weight, per_token = weight[mine], [x[mine] for x in per_token]
    if case.what == "scores":
        scores = our_scores(local, *leaves, top_k=min(3, case.vocab))
        value = mix(scores)
    else:
        scores = None
        fn, weight = result(case, local, weight, per_token, ours=True)
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


def worker(folder, rank, world):
    dist.init_process_group(
        "gloo", f"file://{folder}/store", rank=rank, world_size=world, timeout=timedelta(seconds=60)
    )  # fmt: skip
    results = {}
    try:
        for case in CASES:
            results[str(case)] = found(case, rank, world, dist.group.WORLD)
        for own_tokens in (False, True):
            results[f"equal {own_tokens}"] = equal_models(own_tokens, rank, world, dist.group.WORLD)
        if world == 3:
            group = dist.new_group([1, 2])
            for case in SHARED if rank else []:
                results[f"group {case}"] = found(case, rank - 1, 2, group)
    except Exception:
        results["error"] = traceback.format_exc()
    torch.save(results, folder / f"{rank}.pt")
    if "error" in results:
        os._exit(1)  # the others may be waiting in a collective
    dist.destroy_process_group()


# ---- the tests ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """What each of `world` processes found, by case; started once per world size."""

    @cache
    def start(world):
        folder = tmp_path_factory.mktemp(f"world{world}")
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        processes = [
            subprocess.Popen(
                [sys.executable, __file__, str(folder), str(rank), str(world)],
                env=environment, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
            )
            for rank in range(world)
        ]  # fmt: skip
        try:
            errors = "\n".join(p.communicate(timeout=200)[1] for p in processes)
        finally:
            for p in processes:
                p.kill()
        paths = [folder / f"{rank}.pt" for rank in range(world)]
        return [torch.load(p, weights_only=False) if p.exists() else {"error": errors[-6000:]} for p in paths]

    def results(world, name, members=None):
        of_all = start(world)
        for rank in range(world) if members is None else members:
            assert name in of_all[rank], f"rank {rank} did not get there: {of_all[rank].get('error', 'no error')}"
        return [of_all[rank][name] for rank in (range(world) if members is None else members)]

    return results


def spread(values, index, size):
    """Values at index, zeros elsewhere."""
    out = torch.zeros(size, *values.shape[1:], dtype=values.dtype)
    out[index] = values
    return out


def compare(case, world, results):
    two, weight, per_token = numbers(case, world)
    mine, words = tokens_of(case, world), alive(case, world)
    count = 0 if case.special == "no tokens" else TOKENS
    kept = torch.tensor([t for t in range(count) if case.special != "NaN token" or t != POISONED], dtype=torch.long)
    part = two.tokens(kept).vocabulary(words)
    fn, weight = result(case, part, weight[kept], [x[kept] for x in per_token])
    value, *gradients = value_and_gradients(fn, part.leaves, weight)
    gradients = [
        spread(g, i, n)
        for g, i, n in zip(gradients, (kept, words, words), (count, case.vocab, case.vocab), strict=False)
    ]
    for rank, (rows, own, found_here) in enumerate(zip(dealt(case, world), mine, results, strict=True)):
        rows = slice(*rows)
        here = (kept >= own.start) & (kept < own.stop)  # of the tokens that count, this rank's
        counted = kept[here] - own.start
        expected = [gradients[0][own], *(g[rows] for g in gradients[1:])]
        for name, gradient in zip(NAMES, expected, strict=False):
            if case.special == f"frozen {name}":
                assert found_here[name] is None
            else:
                torch.testing.assert_close(
                    found_here[name], gradient, **EXACT, msg=lambda m, n=name, r=rank: f"{n} on {r}: {m}"
                )
        if case.what.startswith("loss "):
            fn, _ = result(case, part.tokens(here), None, [x[kept][here] for x in per_token])
            torch.testing.assert_close(found_here["value"], fn(*part.tokens(here).leaves), **EXACT)
            continue
        assert found_here["value"].shape == (own.stop - own.start,)
        torch.testing.assert_close(found_here["value"][counted], value[here], **EXACT)
        if case.what == "scores":
            compare_scores(part.tokens(here), words, counted, found_here["scores"])


def compare_scores(two, words, counted, scores):
    truth = dense_scores(two, *two.leaves)
    for field in (*DIFFERENTIABLE, *CONSTANT):
        torch.testing.assert_close(scores[field][counted].double(), getattr(truth, field), **EXACT, msg=field)
    for side, logits in {"": two.logits(*two.leaves), "ref_": two.ref_logits}.items():
        top = torch.softmax(logits, -1).topk(min(3, len(words)))
        torch.testing.assert_close(scores[f"{side}top_p"][counted][:, : len(top.values[0:1].T)], top.values, **EXACT)
        assert torch.equal(scores[f"{side}top_ids"][counted][:, : top.indices.shape[1]], words[top.indices])


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_ranks_find_the_dense_result(case, world, ranks):
    compare(case, world, ranks(world, str(case)))


@pytest.mark.parametrize("case", SHARED, ids=str)
def test_a_group_without_rank_zero(case, ranks):
    compare(case, 2, ranks(3, f"group {case}", (1, 2)))


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("own_tokens", [False, True])
def test_equal_models_have_no_divergence_on_any_rank(own_tokens, world, ranks):
    for differences in ranks(world, f"equal {own_tokens}"):
        assert not differences.any()


if __name__ == "__main__":
    worker(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
