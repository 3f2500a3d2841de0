"""EMAReference of a policy that FSDP2 shards over two processes: it follows the whole weights. Run as a script too."""

import sys

import peft
import pytest
import torch
from support import tiny
from support.processes import launch, leave

from klft import EMAReference
from klft.models import causal_inputs, evaluating

IDS = torch.tensor([[3, 8, 6, 4, 11, 5]])


def main():
    import torch.distributed as dist
    from torch.distributed.fsdp import fully_shard

    dist.init_process_group("gloo")
    policy, oracle = tiny.llama(), tiny.llama()
    reference = EMAReference(policy, decay=0.5)
    adapted = peft.get_peft_model(tiny.llama(1), tiny.lora())
    of_adapter = EMAReference(adapted, decay=0.5)
    for model in (policy, adapted):
        fully_shard(model)
    for p, own in zip(policy.parameters(), oracle.parameters(), strict=True):
        with torch.no_grad():
            p *= 3
            own *= 2  # half of 1 and 3
    reference.after_step(policy)
    with evaluating(oracle):
        want = oracle(**causal_inputs(oracle, IDS, torch.ones_like(IDS))).logits
    torch.testing.assert_close(reference.logits(IDS, torch.ones_like(IDS)), want)
    with pytest.raises(ValueError, match="or is sharded"):
        of_adapter.logits(IDS, torch.ones_like(IDS))
    print("followed")
    leave()


@pytest.mark.slow
def test_the_policy_may_be_sharded_by_fsdp2():
    done = launch(__file__, timeout=300)
    assert done.stdout.count("followed") == 2, done.stdout[-2000:] + done.stderr[-3000:]


if __name__ == "__main__":
    sys.exit(main())
