"""The self-test: what must hold of a policy and its reference before the first step, measured on three short rows.

    for check in klft.check_setup(policy, reference, tokenizer, optimizer=optimizer):
        print(check.status, check.name, check.text)

Most wrong KLs come from a pair that is not what its user thinks: a reference that moves with the policy, dropout that
is on for one of two forwards, padding that is read, a head without its softcap. Each check measures one of them and
leaves weights, modes and gradients as they were. PPOTrainer runs them before its first rollout, `klft doctor` from the
command line. Over processes all call together.
"""

from klft.checks.run import check_setup, raise_problems, run_checks
from klft.checks.setup import Check, Rollout, Setup

__all__ = ["Check", "Rollout", "Setup", "check_setup", "raise_problems", "run_checks"]
