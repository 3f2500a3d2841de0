"""The self-test before the first rollout: klft.checks on the policy as this trainer samples, scores and trains it."""

import logging
import time
from typing import Any

import torch
from torch import nn

from klft.checks import Rollout, Setup, raise_problems, run_checks
from klft.generation import sampled_logps
from klft.models import quiet, unwrap
from klft.ppo.collector import RolloutCollector
from klft.ppo.guards import on_all_ranks
from klft.prompts import completion_mask, eos_ids, pad_id

logger = logging.getLogger(__name__)
SAMPLED = 4  # tokens of two rows


def run_self_test(collector: RolloutCollector, model: nn.Module, optimizer: Any, *, starts_equal: bool | None) -> float:
    """Seconds it took. Draws no random number of the run's, and leaves weights, modes and gradients as they were.

    starts_equal: see klft.check_setup. Raises RuntimeError on every process, naming what is wrong and what to do.
    """
    start, accelerator, args = time.perf_counter(), collector.accelerator, collector.args
    policy = unwrap(model)  # of torch.compile too, which would compile for these few rows
    setup = Setup(
        policy, collector.scorer.reference, collector.tokenizer,
        optimizer=None if optimizer is None else getattr(optimizer, "optimizer", optimizer),
        temperature=args.temperature, starts_equal=starts_equal, scorer=collector.scorer,
        low_precision=True if accelerator.mixed_precision != "no" else None,
        loss_mode=(lambda: quiet(policy)) if args.disable_dropout else policy.eval,
    )  # fmt: skip
    devices = [accelerator.device] if accelerator.device.type == "cuda" else []
    with torch.random.fork_rng(devices), accelerator.autocast():
        checks = run_checks(setup, on_all_ranks(accelerator, lambda: _rollout(collector, setup)))
    on_all_ranks(accelerator, lambda: raise_problems(checks, "self-test before the first step"))
    seconds = time.perf_counter() - start
    for check in checks:
        logger.log(logging.WARNING if check.status == "note" else logging.DEBUG, f"{check.name}: {check.text}")
    logger.info(f"self-test: {len(checks)} checks in {seconds:.2f} s (self_test=False leaves them out)")
    return seconds


def _rollout(collector: RolloutCollector, setup: Setup) -> Rollout:
    """A few tokens after the rows of the self-test, as the trainer samples them."""
    args, policy, tokenizer = collector.args, setup.policy, collector.tokenizer
    ids, mask = (t[:2] for t in setup.batch)
    config = args.generation_config(eos_ids(policy, tokenizer), pad_id(tokenizer))
    config.max_new_tokens = min(SAMPLED, args.max_completion_length)
    sampler: Any = policy
    completion_ids, logp = sampled_logps(sampler, ids, mask.bool(), config, collector.scorer.shared_vocab(policy))
    counted, _ = completion_mask(completion_ids, eos_ids(policy, tokenizer))
    nothing, none = torch.zeros_like(mask, dtype=torch.bool), torch.zeros_like(ids, dtype=logp.dtype)
    whole = args.top_p == 1 and not args.top_k and not args.generation_kwargs
    return Rollout(
        torch.cat([ids, completion_ids.masked_fill(~counted, pad_id(tokenizer))], 1),
        torch.cat([mask, counted.long()], 1),
        torch.cat([nothing, counted], 1),
        torch.cat([none, logp], 1) if whole else None,  # else what is sampled differs from what is scored, as asked
    )
