"""A run that is cut in any pass over its prompts and resumed takes the prompts of the one that was not cut."""

import sys
from pathlib import Path

import pytest
import torch
from support import tiny
from support.processes import launch, leave

PROMPTS = 9  # per_rollout is 2, 4 or 6: always some left over
CUTS = {1: (2, 4, 6, 11), 2: (2, 3, 5), 3: (1, 2)}  # in and between the passes, of 4, 2 and 1 rollouts


def go(folder, steps, resume=None):
    """(prompts of this process by step, parameters) of three passes, or of the rest of them."""
    seen = []

    def reward(prompts, completion_ids, trainer_state, **_):
        seen.append((trainer_state.global_step + 1, prompts))
        return tiny.mixed(completion_ids)

    run = tiny.trainer(
        folder, None, reward, tiny.prompts(PROMPTS), max_steps=steps, per_device_train_batch_size=2,
        save_strategy="steps", save_steps=1.0, seed=3,
    )  # fmt: skip
    run.train(resume_from_checkpoint=resume)
    return seen, tiny.parameters(run.model)


def what_differs(folder, processes):
    """Of each cut: what the resumed run did otherwise than the whole one."""
    last = 3 * (PROMPTS // (2 * processes))
    prompts, parameters = go(folder / "whole", last)
    found = {}
    for cut in CUTS[processes]:
        go(folder / f"cut{cut}", cut)
        resumed, its_parameters = go(folder / f"cut{cut}", last, True)
        differs = [*tiny.unequal(parameters, its_parameters)]
        if resumed != [p for p in prompts if p[0] > cut]:
            differs.append("prompts")
        found[cut] = differs
    return found


@pytest.mark.parametrize("processes", [1, *(pytest.param(n, marks=pytest.mark.slow) for n in (2, 3))])
def test_a_run_cut_in_any_pass_takes_the_same_prompts(processes, tmp_path):
    if processes == 1:
        results = [what_differs(tmp_path, 1)]
    else:
        done = launch(__file__, tmp_path, processes=processes, timeout=240)
        assert done.returncode == 0, done.stderr[-3000:]
        results = [torch.load(tmp_path / f"{rank}.pt") for rank in range(processes)]
    for rank, found in enumerate(results):
        assert found == {cut: [] for cut in CUTS[processes]}, f"rank {rank}"


if __name__ == "__main__":
    import conftest  # noqa: F401 - no hub, few threads
    import torch.distributed as dist

    tiny.config(sys.argv[1])  # joins the process group
    torch.save(what_differs(Path(sys.argv[1]), dist.get_world_size()), f"{sys.argv[1]}/{dist.get_rank()}.pt")
    leave()
