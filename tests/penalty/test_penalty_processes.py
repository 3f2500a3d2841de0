"""The coefficient of a loop of one's own is the same on every process: the one that a single process would have.

Run as a script, this file is what each process does.
"""

import subprocess
import sys

import torch
import torch.distributed as dist
from support import tiny
from support.processes import environment, leave

import klft


def coefficient(rank, processes):
    """After five steps of a loop over four texts, shared out over the processes."""
    policy, reference = tiny.llama(1).eval(), tiny.llama(0)
    penalty = klft.KLPenalty(reference, controller=klft.AdaptiveKL(0.1, target=6.0, horizon=100))
    lengths = torch.tensor([30, 30, 6, 6])  # the second process's texts are shorter
    share = 4 // processes
    mine = slice(rank * share, (rank + 1) * share)
    for step in range(5):
        ids = torch.randint(3, tiny.VOCABULARY, (4, 30), generator=torch.Generator().manual_seed(step))
        attention = (torch.arange(30) < lengths[:, None]).long()
        ids, attention = ids[mine], attention[mine]
        with torch.no_grad():
            logits = policy(**klft.causal_inputs(policy, ids, attention)).logits
        penalty.update(penalty.measure(logits, ids, attention, attention))
    return penalty.coef


def test_processes_have_one_coefficient(tmp_path):
    commands = [[sys.executable, __file__, str(tmp_path / "store"), str(rank)] for rank in range(2)]
    runs = [subprocess.Popen(c, stdout=subprocess.PIPE, text=True, env=environment()) for c in commands]
    texts = [run.communicate(timeout=300)[0] for run in runs]
    assert [run.returncode for run in runs] == [0, 0]
    first, second = map(float, texts)
    assert first == second
    assert abs(first - coefficient(0, 1)) < 1e-9
    assert abs(first - 0.1) > 1e-4, "it moved"


if __name__ == "__main__":
    import conftest  # noqa: F401 - no hub, few threads

    rank = int(sys.argv[2])
    dist.init_process_group("gloo", f"file://{sys.argv[1]}", rank=rank, world_size=2)
    print(repr(coefficient(rank, 2)), flush=True)
    leave()
