"""The coefficient and the metrics of a loop of one's own are the same on every process: those of a single process.

Run as a script, this file is what each process does.
"""

import json
import subprocess
import sys

import torch
import torch.distributed as dist
from support import tiny
from support.processes import environment, leave
from transformers import GenerationConfig

import klft
from klft.generation import sample_completions
from klft.scoring import score_texts


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


def metrics(rank, processes, weighted, all_processes=True):
    """Of six sequences, of which the first process has four, one of them without a token, and the second two."""
    generator = torch.Generator().manual_seed(0)
    reverse, forward, logp, ref_logp = torch.randn(4, 6, 9, generator=generator).abs() - 4
    sampled, agree = torch.rand(2, 6, 9, generator=generator) < 0.7
    reverse[5, 2] = torch.inf
    mask = torch.arange(9) < torch.tensor([9, 0, 5, 3, 7, 4])[:, None]
    weight = torch.rand(6, 9, generator=generator).round(decimals=1) if weighted else None
    mine = slice(None) if processes == 1 else slice(0, 4) if rank == 0 else slice(4, 6)
    fields = {"reverse_kl": reverse + 4, "forward_kl": forward + 4, "top1_agree": agree, "sampled": sampled}
    scores = klft.TokenScores(logp[mine], ref_logp[mine], **{name: t[mine] for name, t in fields.items()})
    scores.logp.requires_grad_()
    weight = None if weight is None else weight[mine]
    return klft.kl_metrics(scores, mask[mine], weight=weight, all_processes=all_processes)


def complaints():
    """What generation, score_texts and a penalty say of a policy whose logits are NaN."""
    broken, ids = tiny.llama().eval(), torch.full((1, 3), 5)
    torch.nn.init.constant_(broken.lm_head.weight, torch.nan)
    wanted = GenerationConfig(max_new_tokens=2, do_sample=True, pad_token_id=tiny.PAD, eos_token_id=tiny.EOS)
    penalty, ones = klft.KLPenalty(tiny.llama()), torch.ones_like(ids)
    texts = {"texts": ["w1 w2"], "batch_size": 1, "max_length": 8}
    said = []
    for call in (
        lambda: sample_completions(broken, ids, ones.bool(), wanted, tiny.VOCABULARY),
        lambda: list(score_texts(broken, tiny.apart(), tiny.tokenizer(), **texts)),
        lambda: penalty.token_kl(penalty.measure(broken(ids).logits, ids, ones, ones)),
    ):
        try:
            call()
        except ValueError as error:
            said.append(str(error))
    return said


def test_processes_have_one_coefficient_and_one_set_of_metrics(tmp_path):
    commands = [[sys.executable, __file__, str(tmp_path / "store"), str(rank)] for rank in range(2)]
    runs = [subprocess.Popen(c, stdout=subprocess.PIPE, text=True, env=environment()) for c in commands]
    texts = [run.communicate(timeout=300)[0] for run in runs]
    assert [run.returncode for run in runs] == [0, 0]
    (first, *metrics_of_first), (second, *metrics_of_second) = map(json.loads, texts)
    for rank, said in enumerate((metrics_of_first.pop(), metrics_of_second.pop())):
        assert [message.count(f" on rank {rank} ") for message in said] == [1, 1, 1]
        assert [message.replace(f" on rank {rank}", "") for message in said] == complaints()
    assert first == second
    assert abs(first - coefficient(0, 1)) < 1e-9
    assert abs(first - 0.1) > 1e-4, "it moved"
    assert metrics_of_first[:2] == metrics_of_second[:2] == [metrics(0, 1, weighted) for weighted in (False, True)]
    assert metrics_of_first[2] != metrics_of_second[2], "by default each process has its own"
    assert metrics_of_first[0]["kl/nonfinite/count"] == 1
    assert metrics_of_first[0]["kl/tokens/count"] == 28


if __name__ == "__main__":
    import conftest  # noqa: F401 - no hub, few threads

    rank = int(sys.argv[2])
    dist.init_process_group("gloo", f"file://{sys.argv[1]}", rank=rank, world_size=2)
    found = [metrics(rank, 2, weighted) for weighted in (False, True)] + [metrics(rank, 2, False, all_processes=False)]
    print(json.dumps([coefficient(rank, 2), *found, complaints()]), flush=True)
    leave()
