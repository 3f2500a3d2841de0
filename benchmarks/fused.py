"""KL without logits beside what else there is, in one process: ratios of time and of memory.

    python benchmarks/fused.py [--rounds 5] [--only speed growth memory processes ppo busy]

Contenders: klft; TRL's own kernels (imported from where they are, private or not: here that is the point); a chunked
KL in the manner of torchtune (chunks of tokens, logits recomputed under checkpointing); dense logits; and the bare
matrix products on klft's tiles, which nobody can do without. fp32 on a CPU, bf16 on a GPU. Each round runs every
contender once, in turn; what is printed are medians of the rounds' ratios.
"""

import argparse
import gc
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

import klft
from klft import LMHead, VocabShard, fused_token_loss, token_scores
from klft.fused.api import plan_of

CUDA = torch.cuda.is_available()
DEVICE, DTYPE = ("cuda", torch.bfloat16) if CUDA else ("cpu", torch.float32)


class Case:
    """Hidden states and heads of a policy and a reference that lies near it."""

    def __init__(self, tokens: int, hidden_size: int, vocab_size: int):
        self.tokens, self.hidden_size, self.vocab_size = tokens, hidden_size, vocab_size
        generator = torch.Generator().manual_seed(0)

        def draw(*shape: int, scale: float = 1.0) -> Tensor:
            return (torch.randn(*shape, generator=generator) * scale).to(DEVICE, DTYPE)

        self.hidden = draw(tokens, hidden_size).requires_grad_()
        self.weight = draw(vocab_size, hidden_size, scale=hidden_size**-0.5).requires_grad_()
        self.ref_hidden = self.hidden.detach() + draw(tokens, hidden_size, scale=0.3)
        self.ref_weight = self.weight.detach() + draw(vocab_size, hidden_size, scale=0.1 * hidden_size**-0.5)
        self.token_ids = torch.randint(0, vocab_size, (tokens,), generator=generator).to(DEVICE)

    def __str__(self) -> str:
        return f"N {self.tokens}, D {self.hidden_size}, V {self.vocab_size}"

    def zero_grad(self) -> None:
        """Forget the gradients of the run before, so that every run allocates its own."""
        self.hidden.grad = self.weight.grad = None


Contender = Callable[[Case], None]


# --- contenders: reverse KL, forward and backward --------------------------------------------------------------------


def klft_loss(case: Case) -> None:
    """klft: the gradient is made tile by tile, within the forward."""
    fused_token_loss(
        lambda scores: scores.reverse_kl.sum(),
        hidden=case.hidden,
        head=LMHead(case.weight),
        token_ids=case.token_ids,
        ref_hidden=case.ref_hidden,
        ref_head=LMHead(case.ref_weight),
    ).backward()


def trl_loss(case: Case) -> None:
    """TRL's chunked kernel."""
    from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

    # (hidden, weight, bias) of the student, the same of the teacher, beta; an autograd.Function takes no keywords.
    student, teacher = (case.hidden, case.weight, None), (case.ref_hidden, case.ref_weight, None)
    outputs: Any = ChunkedDivergenceFunction.apply(*student, *teacher, 1.0)
    outputs[0].sum().backward()


def plain_kl(logits: Tensor, ref_logits: Tensor) -> Tensor:
    """KL(p||q) as it is usually written, summed over tokens."""
    logp, ref_logp = logits.float().log_softmax(-1), ref_logits.float().log_softmax(-1)
    return (logp.exp() * (logp - ref_logp)).sum()


def dense_loss(case: Case) -> None:
    """Dense logits, klft's formula."""
    klft.reverse_kl(case.hidden @ case.weight.t(), case.ref_hidden @ case.ref_weight.t()).sum().backward()


def plain_loss(case: Case) -> None:
    """Dense logits, the usual formula."""
    plain_kl(case.hidden @ case.weight.t(), case.ref_hidden @ case.ref_weight.t()).backward()


def checkpointed_loss(case: Case) -> None:
    """Eight chunks of tokens, each recomputed in the backward: torchtune's way."""
    from torch.utils.checkpoint import checkpoint

    def chunk_loss(hidden: Tensor, ref_hidden: Tensor) -> Tensor:
        return plain_kl(hidden @ case.weight.t(), ref_hidden @ case.ref_weight.t())

    losses = []
    for hidden, ref_hidden in zip(case.hidden.chunk(8), case.ref_hidden.chunk(8), strict=True):
        loss: Any = checkpoint(chunk_loss, hidden, ref_hidden, use_reentrant=False)
        losses.append(loss)
    torch.stack(losses).sum().backward()


@torch.no_grad()
def products(case: Case) -> None:
    """Logits of both, gradient of the hidden states, gradient of the weight: on klft's tiles, nothing else."""
    head, ref_head = LMHead(case.weight), LMHead(case.ref_weight)
    plan = plan_of(case.hidden, head, case.token_ids, case.ref_hidden, ref_head)
    weight_grad = torch.zeros_like(case.weight)
    workspace = torch.empty(plan.geometry.chunk_size * case.vocab_size, dtype=DTYPE, device=DEVICE)
    for chunk in plan.chunks:
        hidden = case.hidden[chunk]
        # On a CPU a tile lies as [V, n], one row of the vocabulary after another, as klft's do.
        tile = workspace[: len(hidden) * case.vocab_size]
        if plan.backend.VOCAB_MAJOR:
            logits = tile.view(case.vocab_size, len(hidden)).t()
        else:
            logits = tile.view(len(hidden), case.vocab_size)
        torch.mm(case.ref_hidden[chunk], case.ref_weight.t(), out=logits)
        torch.mm(hidden, case.weight.t(), out=logits)
        torch.mm(logits, case.weight)
        weight_grad.addmm_(logits.t(), hidden)


# --- contenders: scores of sampled tokens, forward only --------------------------------------------------------------


@torch.no_grad()
def klft_scores(case: Case) -> None:
    """klft: log-probabilities, entropies and both exact KLs."""
    token_scores(
        hidden=case.hidden,
        head=LMHead(case.weight),
        token_ids=case.token_ids,
        ref_hidden=case.ref_hidden,
        ref_head=LMHead(case.ref_weight),
    )


@torch.no_grad()
def trl_logps(case: Case) -> None:
    """TRL: log-probabilities of both models."""
    from trl.kernels import ChunkedLogProbFunction

    temperature, chunk_size, softcap, logit_scale, more_outputs = 1.0, 32_768, None, 1.0, ()
    for hidden, weight in ((case.hidden, case.weight), (case.ref_hidden, case.ref_weight)):
        ChunkedLogProbFunction.apply(
            hidden, weight, None, case.token_ids, temperature, chunk_size, softcap, logit_scale, more_outputs
        )


LOSSES = (klft_loss, trl_loss, checkpointed_loss, dense_loss, plain_loss, products)
CONTENDERS: dict[str, Contender] = {contender.__name__: contender for contender in (*LOSSES, klft_scores, trl_logps)}


# --- timing ----------------------------------------------------------------------------------------------------------


def seconds(contender: Contender, case: Case) -> float:
    """Time of one run."""
    case.zero_grad()
    if CUDA:
        torch.cuda.synchronize()
    start = time.perf_counter()
    contender(case)
    if CUDA:
        torch.cuda.synchronize()
    return time.perf_counter() - start


def race(contenders: list[Contender], case: Case, *, rounds: int) -> dict[str, list[float]]:
    """Seconds of every round by name; a round before them, which warms up, is left out."""
    times: dict[str, list[float]] = {contender.__name__: [] for contender in contenders}
    for _ in range(rounds + 1):
        for contender in contenders:
            times[contender.__name__].append(seconds(contender, case))
    return {name: values[1:] for name, values in times.items()}


def ratio(times: list[float], base_times: list[float]) -> float:
    """Median of the rounds' ratios: both contenders of a round met the same machine."""
    return statistics.median(time / base for time, base in zip(times, base_times, strict=True))


def speed(rounds: int) -> None:
    """Time of klft's loss and scores over the others' and over the bare products."""
    sizes = ((8192, 4096, 128_256),) if CUDA else ((1024, 512, 32_768), (512, 896, 151_936))
    for size in sizes:
        case = Case(*size)
        times = race(list(LOSSES), case, rounds=rounds)
        print(f"{case}: fused_token_loss(reverse_kl), forward and backward, is")
        for name in ("trl_loss", "checkpointed_loss", "dense_loss", "plain_loss"):
            print(f"    {ratio(times[name], times['klft_loss']):5.2f} x as fast as {name}")
        print(f"    {ratio(times['klft_loss'], times['products']):5.2f} x the time of its four matrix products")

        # Four products of 2 N D V operations; of 4 bytes each, both heads and a gradient, and two tiles of logits.
        weight_size, logits_size = case.vocab_size * case.hidden_size, case.tokens * case.vocab_size
        operations = 8 * case.tokens * weight_size
        bytes_moved = 4 * (3 * weight_size + 2 * logits_size)
        print(
            f"    {operations / 1e9:.0f} Gflop, at least {bytes_moved / 1e9:.2f} GB "
            "(both heads, one gradient, two tiles once)"
        )
        times = race([klft_scores, trl_logps], case, rounds=rounds)
        over_trl = ratio(times["klft_scores"], times["trl_logps"])
        print(f"    token_scores: {over_trl:.2f} x TRL's log-probabilities of both models")


def busy(rounds: int) -> None:
    """Time beside another process that keeps a core busy, over the time alone."""
    contenders, case = [klft_loss, trl_loss, dense_loss, products], Case(1024, hidden_size=512, vocab_size=32_768)
    alone = race(contenders, case, rounds=rounds)
    with subprocess.Popen([sys.executable, "-c", "while True: pass"]) as other:
        try:
            beside = race(contenders, case, rounds=rounds)
        finally:
            other.kill()
    for name, times in beside.items():
        over_alone, over_klft = ratio(times, alone[name]), ratio(times, beside["klft_loss"])
        print(f"    {name}: {over_alone:.2f} x its time alone, {over_klft:.2f} x klft_loss")


def growth(rounds: int) -> None:
    """Time of klft's loss as N, D and V grow one at a time."""
    base = {"tokens": 256, "hidden_size": 256, "vocab_size": 16_384}
    for letter, name in (("N", "tokens"), ("D", "hidden_size"), ("V", "vocab_size")):
        medians = []
        for factor in (1, 2, 4):
            case = Case(**{**base, name: base[name] * factor})
            medians.append(statistics.median(race([klft_loss], case, rounds=rounds)["klft_loss"]))
        ratios = ", ".join(f"{median / medians[0]:.2f}" for median in medians)
        print(f"{letter} x 1, 2, 4 from N 256, D 256, V 16,384: time x {ratios}")


# --- memory ----------------------------------------------------------------------------------------------------------


def peak_memory(contender: Contender, case: Case) -> float:
    """Bytes at the peak of one run, beyond what was there before."""
    case.zero_grad()
    gc.collect()
    return _peak_on_gpu(contender, case) if CUDA else _peak_on_cpu(contender, case)


def _peak_on_gpu(contender: Contender, case: Case) -> float:
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    contender(case)
    return torch.cuda.max_memory_allocated() - before


def _peak_on_cpu(contender: Contender, case: Case) -> float:
    def kilobytes(name: str) -> int:
        with open("/proc/self/status") as status:
            return next(int(line.split()[1]) for line in status if line.startswith(name))

    with open("/proc/self/clear_refs", "w") as reset:
        reset.write("5")  # the peak, VmHWM, starts again from what is resident now, VmRSS
    before = kilobytes("VmRSS")
    contender(case)
    return 1024 * (kilobytes("VmHWM") - before)


def memory(_rounds: int) -> None:
    """Peak memory of klft's loss over TRL's and over dense logits', each in a process of its own."""
    # On a CPU a small D: it costs time, and hardly any memory.
    tokens, hidden_size, vocab_size = (8192, 4096, 128_256) if CUDA else (4096, 64, 151_936)
    peaks = {}
    for name in ("klft_loss", "trl_loss", "dense_loss"):
        size = [str(tokens), str(hidden_size), str(vocab_size)]
        command = [sys.executable, __file__, "--peak", name, *size]
        done = subprocess.run(command, capture_output=True, text=True)
        peaks[name] = float(done.stdout) if done.returncode == 0 else float("nan")  # NaN: it did not fit

    mebibyte = 2**20
    logits, weight = tokens * vocab_size * 4 / mebibyte, vocab_size * hidden_size * 4 / mebibyte
    print(
        f"N {tokens}, D {hidden_size}, V {vocab_size}: klft takes {peaks['klft_loss'] / mebibyte:.0f} MiB at the peak; "
        f"one matrix of logits has {logits:.0f}, the weight's gradient {weight:.0f}"
    )
    for name in ("trl_loss", "dense_loss"):
        print(f"    {peaks['klft_loss'] / peaks[name]:.3f} of what {name} takes")


# --- several processes -----------------------------------------------------------------------------------------------


class ShardedRun(NamedTuple):
    """One group of processes, as each of them must know it."""

    processes: int
    threads: int
    rounds: int
    rendezvous: str  # the file by which they find each other


def run_rank(rank: int, run: ShardedRun, queue: Any) -> None:
    """One process: times klft's loss with its share of the vocabulary. Rank 0 reports (seconds, vocab rows)."""
    torch.set_num_threads(run.threads)
    dist.init_process_group("gloo", init_method=f"file://{run.rendezvous}", rank=rank, world_size=run.processes)
    case = Case(512, hidden_size=512, vocab_size=32_768)
    shard = VocabShard.even(case.vocab_size)
    weight = case.weight.detach()[shard.start : shard.stop].clone().requires_grad_()
    ref_weight = case.ref_weight[shard.start : shard.stop]

    def sharded_loss(case: Case) -> None:
        fused_token_loss(
            lambda scores: scores.reverse_kl.sum(),
            hidden=case.hidden,
            head=LMHead(weight, shard=shard),
            token_ids=case.token_ids,
            ref_hidden=case.ref_hidden,
            ref_head=LMHead(ref_weight, shard=shard),
        ).backward()

    times = race([sharded_loss], case, rounds=run.rounds)["sharded_loss"]
    if rank == 0:
        queue.put((statistics.median(times), len(weight)))
    dist.destroy_process_group()


def processes(rounds: int) -> None:
    """Time of klft's loss with the vocabulary over 1, 2 and 4 gloo processes, over that of one."""
    import torch.multiprocessing as mp

    single_process_time = None
    for count in (1, 2, 4):
        queue = mp.get_context("spawn").SimpleQueue()
        threads = max(1, torch.get_num_threads() // count)
        with tempfile.TemporaryDirectory() as folder:
            run = ShardedRun(processes=count, threads=threads, rounds=rounds, rendezvous=f"{folder}/meet")
            mp.spawn(run_rank, (run, queue), nprocs=count)  # pyright: ignore
        median, vocab_rows = queue.get()
        if single_process_time is None:
            single_process_time = median
        print(
            f"{count} process(es), {threads} thread(s) each: {vocab_rows} rows each, "
            f"time x {median / single_process_time:.2f}"
        )


# --- a whole model ---------------------------------------------------------------------------------------------------


def ppo(rounds: int) -> None:
    """Time and peak memory of a PPO micro-batch without logits, over those with them."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from klft.models import hidden_states
    from klft.ppo.losses import policy_losses

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32_768, hidden_size=512, intermediate_size=1408, num_hidden_layers=4, num_attention_heads=8
    )
    model: Any = LlamaForCausalLM(config).to(DEVICE, DTYPE)
    ids = torch.randint(0, config.vocab_size, (8, 129), device=DEVICE)
    predicted = ids[:, 1:].flatten()  # [1024]
    old_logp, advantages = torch.full((8 * 128,), -10.4, device=DEVICE), torch.randn(8 * 128, device=DEVICE)

    def loss(logp: Tensor, old_logp: Tensor, advantages: Tensor) -> Tensor:
        losses, *_ = policy_losses(logp - old_logp, advantages, cliprange=0.2)
        return losses.sum()

    def with_logits(_: Case) -> None:
        # No name for the logits: it would keep them alive through the backward.
        logp = klft.token_logps(model(input_ids=ids).logits[:, :-1].flatten(0, 1), predicted)
        loss(logp, old_logp=old_logp, advantages=advantages).backward()

    def without_logits(_: Case) -> None:
        with hidden_states(model) as kept:
            model(input_ids=ids)
        fused_token_loss(
            lambda scores, old_logp, advantages: loss(scores.logp, old_logp=old_logp, advantages=advantages),
            hidden=kept.hidden[:, :-1].flatten(0, 1),
            head=LMHead.from_model(model),
            token_ids=predicted,
            per_token=(old_logp, advantages),
        ).backward()

    unused = Case(1, hidden_size=1, vocab_size=1)  # race and peak_memory want one; the model here has its own head
    times = race([with_logits, without_logits], unused, rounds=rounds)
    model.zero_grad()
    peak_with, peak_without = peak_memory(with_logits, unused), peak_memory(without_logits, unused)
    print(
        f"PPO micro-batch of 1024 tokens, a Llama of {model.num_parameters() / 1e6:.0f} M parameters, V 32,768: "
        f"time without logits x {ratio(times['without_logits'], times['with_logits']):.2f}, "
        f"peak memory x {peak_without / peak_with:.2f}"
    )


# --- command line ----------------------------------------------------------------------------------------------------

# What --only names -> its heading, and the function that prints it.
SECTIONS: dict[str, tuple[str, Callable[[int], None]]] = {
    "speed": ("(a) against everything else.", speed),
    "growth": ("(b) in N, V and D, relative to the first of each row.", growth),
    "memory": ("(c) peak memory, the weight's gradient included, each in a process of its own.", memory),
    "processes": ("(d) the vocabulary over 1, 2 and 4 gloo processes that share this machine's cores.", processes),
    "ppo": ("(e) one PPO micro-batch, model and all, with logits and without.", ppo),
    "busy": ("(f) with another process that never rests, against the same alone.", busy),
}


def main() -> None:
    """Read the command line and print the sections it asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", nargs="+", choices=list(SECTIONS), default=list(SECTIONS))
    parser.add_argument("--peak", nargs=4, help=argparse.SUPPRESS)  # how `memory` calls this file again
    arguments = parser.parse_args()

    if arguments.peak:
        name, *size = arguments.peak
        print(peak_memory(CONTENDERS[name], Case(*map(int, size))))
        return
    processor = torch.cuda.get_device_name() if CUDA else f"CPU, {torch.get_num_threads()} thread(s)"
    print(f"torch {torch.__version__}, {processor}, {DTYPE}, load {os.getloadavg()[0]:.1f}", flush=True)
    for name in arguments.only:
        heading, run_section = SECTIONS[name]
        print(f"\n{heading}", flush=True)
        run_section(arguments.rounds)


if __name__ == "__main__":
    main()
