"""The coefficient of a loop of one's own is the same on every process: the one that a single process would have."""

import subprocess
import sys

from support.processes import environment

LOOP = """
import os, sys
import torch, torch.distributed as dist
from support import tiny
import klft

folder, rank, processes = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
if processes > 1:
    dist.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=processes)
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
print(repr(penalty.coef), flush=True)
os._exit(0)
"""


def coefficients(folder, processes):
    folder.mkdir()
    commands = [[sys.executable, "-c", LOOP, str(folder), str(rank), str(processes)] for rank in range(processes)]
    runs = [subprocess.Popen(c, stdout=subprocess.PIPE, text=True, env=environment()) for c in commands]
    texts = [run.communicate(timeout=120)[0] for run in runs]
    assert [run.returncode for run in runs] == [0] * processes
    return [float(text) for text in texts]


def test_processes_have_one_coefficient(tmp_path):
    first, second = coefficients(tmp_path / "two", 2)
    (alone,) = coefficients(tmp_path / "one", 1)
    assert first == second
    assert abs(first - alone) < 1e-9
    assert abs(first - 0.1) > 1e-4, "it moved"
