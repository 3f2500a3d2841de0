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
import time
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor

import klft
from klft import LMHead, VocabShard, fused, fused_token_loss, token_scores

CUDA = torch.cuda.is_available()
DEVICE, DTYPE = ("cuda", torch.bfloat16) if CUDA else ("cpu", torch.float32)


class Case:
    """Two heads and their hidden states, N tokens."""

    def __init__(self, n: int, d: int, v: int):
        self.n, self.d, self.v = n, d, v
        generator = torch.Generator().manual_seed(0)

        def draw(*shape: int, scale: float = 1.0) -> Tensor:
            return (torch.randn(*shape, generator=generator) * scale).to(DEVICE, DTYPE)

        self.h, self.w = draw(n, d).requires_grad_(), draw(v, d, scale=d**-0.5).requires_grad_()
        self.ref_h = self.h.detach() + draw(n, d, scale=0.3)
        self.ref_w = self.w.detach() + draw(v, d, scale=0.1 * d**-0.5)
        self.ids = torch.randint(0, v, (n,), generator=generator).to(DEVICE)

    def __str__(self) -> str:
        return f"N {self.n}, D {self.d}, V {self.v}"


def klft_loss(c: Case) -> None:
    fused_token_loss(lambda s: s.reverse_kl.sum(), c.h, LMHead(c.w), c.ids, c.ref_h, LMHead(c.ref_w)).backward()


def trl_loss(c: Case) -> None:
    from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

    ChunkedDivergenceFunction.apply(c.h, c.w, None, c.ref_h, c.ref_w, None, 1.0)[0].sum().backward()  # pyright: ignore


def plain(logits: Tensor, ref_logits: Tensor) -> Tensor:
    lp, lq = logits.float().log_softmax(-1), ref_logits.float().log_softmax(-1)
    return (lp.exp() * (lp - lq)).sum()


def dense_loss(c: Case) -> None:
    klft.reverse_kl(c.h @ c.w.t(), c.ref_h @ c.ref_w.t()).sum().backward()


def plain_loss(c: Case) -> None:
    plain(c.h @ c.w.t(), c.ref_h @ c.ref_w.t()).backward()


def checkpointed_loss(c: Case) -> None:
    """Eight chunks of tokens, each recomputed in the backward."""
    from torch.utils.checkpoint import checkpoint

    def chunk(h: Tensor, ref_h: Tensor) -> Tensor:
        return plain(h @ c.w.t(), ref_h @ c.ref_w.t())

    parts = zip(c.h.chunk(8), c.ref_h.chunk(8), strict=True)
    torch.stack([checkpoint(chunk, *p, use_reentrant=False) for p in parts]).sum().backward()  # pyright: ignore


@torch.no_grad()
def products(c: Case) -> None:
    """Logits of both, gradient of the hidden states, gradient of the weight: on klft's tiles, nothing else."""
    problem = fused._problem(c.h, LMHead(c.w), c.ids, c.ref_h, LMHead(c.ref_w), 1.0)
    grad, tile = torch.zeros_like(c.w), torch.empty(problem.size * c.v, dtype=DTYPE, device=DEVICE)
    for rows in problem.chunks:
        h = c.h[rows]
        z = tile[: len(h) * c.v]
        z = z.view(c.v, len(h)).t() if problem.sliced else z.view(len(h), c.v)
        torch.mm(c.ref_h[rows], c.ref_w.t(), out=z)
        torch.mm(h, c.w.t(), out=z)
        torch.mm(z, c.w)
        grad.addmm_(z.t(), h)


@torch.no_grad()
def klft_scores(c: Case) -> None:
    token_scores(c.h, LMHead(c.w), c.ids, c.ref_h, LMHead(c.ref_w))


@torch.no_grad()
def trl_logps(c: Case) -> None:
    from trl.kernels import ChunkedLogProbFunction

    for h, w in ((c.h, c.w), (c.ref_h, c.ref_w)):
        ChunkedLogProbFunction.apply(h, w, None, c.ids, 1.0, 32_768, None, 1.0, ())


def seconds(f: Callable[[Case], None], c: Case) -> float:
    c.h.grad = c.w.grad = None
    if CUDA:
        torch.cuda.synchronize()
    start = time.perf_counter()
    f(c)
    if CUDA:
        torch.cuda.synchronize()
    return time.perf_counter() - start


def race(contenders: list[Callable], c: Case, rounds: int) -> dict[str, list[float]]:
    """Seconds by name, a warming-up round left out."""
    times: dict[str, list[float]] = {f.__name__: [] for f in contenders}
    for _ in range(rounds + 1):
        for f in contenders:
            times[f.__name__].append(seconds(f, c))
    return {name: t[1:] for name, t in times.items()}


def ratio(a: list[float], b: list[float]) -> float:
    return statistics.median(x / y for x, y in zip(a, b, strict=True))


def speed(rounds: int) -> None:
    """(a) against everything else."""
    sizes = ((8192, 4096, 128_256),) if CUDA else ((1024, 512, 32_768), (512, 896, 151_936))
    for size in sizes:
        c = Case(*size)
        t = race([klft_loss, trl_loss, checkpointed_loss, dense_loss, plain_loss, products], c, rounds)
        print(f"{c}: fused_token_loss(reverse_kl), forward and backward, is")
        for name in ("trl_loss", "checkpointed_loss", "dense_loss", "plain_loss"):
            print(f"    {ratio(t[name], t['klft_loss']):5.2f} x as fast as {name}")
        print(f"    {ratio(t['klft_loss'], t['products']):5.2f} x the time of its four matrix products")
        flop, moved = 8 * c.n * c.d * c.v, 4 * (3 * c.v * c.d + 2 * c.n * c.v)
        print(f"    {flop / 1e9:.0f} Gflop, at least {moved / 1e9:.2f} GB (both heads, one gradient, two tiles once)")
        t = race([klft_scores, trl_logps], c, rounds)
        print(
            f"    token_scores: {ratio(t['klft_scores'], t['trl_logps']):.2f} x TRL's log-probabilities of both models"
        )


def busy(rounds: int) -> None:
    """(f) with another process that never rests, against the same alone."""
    contenders, c = [klft_loss, trl_loss, dense_loss, products], Case(1024, 512, 32_768)
    alone = race(contenders, c, rounds)
    with subprocess.Popen([sys.executable, "-c", "while True: pass"]) as other:
        try:
            beside = race(contenders, c, rounds)
        finally:
            other.kill()
    for name, times in beside.items():
        slower, beside_us = ratio(times, alone[name]), ratio(times, beside["klft_loss"])
        print(f"    {name}: {slower:.2f} x its time alone, {beside_us:.2f} x klft_loss")


def growth(rounds: int) -> None:
    """(b) in N, V and D, relative to the first of each row."""
    base = (256, 256, 16_384)
    for i, name in enumerate("NDV"):
        found = []
        for factor in (1, 2, 4):
            size = list(base)
            size[i] *= factor
            found.append(statistics.median(race([klft_loss], Case(*size), rounds)["klft_loss"]))
        print(
            f"{name} x 1, 2, 4 from N 256, D 256, V 16,384: time x " + ", ".join(f"{t / found[0]:.2f}" for t in found)
        )


def peak(f: Callable[[Case], None], c: Case) -> float:
    """Bytes at the peak beyond what was there before."""
    c.h.grad = c.w.grad = None
    gc.collect()
    if CUDA:
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        f(c)
        return torch.cuda.max_memory_allocated() - before

    def kilobytes(field: str) -> int:
        with open("/proc/self/status") as status:
            return next(int(line.split()[1]) for line in status if line.startswith(field))

    with open("/proc/self/clear_refs", "w") as reset:
        reset.write("5")
    before = kilobytes("VmRSS")
    f(c)
    return 1024 * (kilobytes("VmHWM") - before)


def memory(_rounds: int) -> None:
    """(c) peak memory, the weight's gradient included, each in a process of its own."""
    n, d, v = (8192, 4096, 128_256) if CUDA else (4096, 64, 151_936)  # D only costs time here
    sizes = {}
    for name in ("klft_loss", "trl_loss", "dense_loss"):
        out = subprocess.run(
            [sys.executable, __file__, "--peak", name, str(n), str(d), str(v)], capture_output=True, text=True
        )
        sizes[name] = float(out.stdout) if out.returncode == 0 else float("nan")
    mine = sizes["klft_loss"]
    print(f"N {n}, D {d}, V {v}: klft takes {mine / 2**20:.0f} MiB at the peak; one matrix of logits has "
          f"{n * v * 4 / 2**20:.0f}, the weight's gradient {v * d * 4 / 2**20:.0f}")  # fmt: skip
    for name in ("trl_loss", "dense_loss"):
        print(f"    {mine / sizes[name]:.3f} of what {name} takes")


def member(rank: int, world: int, rendezvous: str, threads: int, rounds: int, size: tuple, queue) -> None:
    torch.set_num_threads(threads)
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=world)
    c = Case(*size)
    shard = VocabShard.even(c.v)
    rows = c.w.detach()[shard.start : shard.stop].clone().requires_grad_()
    ref_rows = c.ref_w[shard.start : shard.stop]

    def split(c: Case) -> None:
        head, ref_head = LMHead(rows, shard=shard), LMHead(ref_rows, shard=shard)
        fused_token_loss(lambda s: s.reverse_kl.sum(), c.h, head, c.ids, c.ref_h, ref_head).backward()

    found = race([split], c, rounds)["split"]
    if rank == 0:
        queue.put((statistics.median(found), len(rows)))
    dist.destroy_process_group()


def processes(rounds: int) -> None:
    """(d) the vocabulary over 1, 2 and 4 gloo processes that share this machine's cores."""
    import tempfile

    import torch.multiprocessing as mp

    size, first = (512, 512, 32_768), 0.0
    context = mp.get_context("spawn")
    for world in (1, 2, 4):
        queue = context.SimpleQueue()
        threads = max(1, torch.get_num_threads() // world)
        with tempfile.TemporaryDirectory() as folder:
            mp.spawn(member, (world, f"{folder}/meet", threads, rounds, size, queue), nprocs=world)  # pyright: ignore
        took, rows = queue.get()
        first = first or took
        print(f"{world} process(es), {threads} thread(s) each: {rows} rows each, time x {took / first:.2f}")


def ppo(rounds: int) -> None:
    """(e) one PPO micro-batch, model and all, with logits and without."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from klft.heads import hidden_states
    from klft.ppo.losses import policy_losses

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32_768, hidden_size=512, intermediate_size=1408, num_hidden_layers=4, num_attention_heads=8
    )
    model = LlamaForCausalLM(config).to(DEVICE, DTYPE)
    ids = torch.randint(0, config.vocab_size, (8, 129), device=DEVICE)
    old, advantages = torch.full((8 * 128,), -10.4, device=DEVICE), torch.randn(8 * 128, device=DEVICE)
    c = Case(1, 1, 1)

    def loss(logp: Tensor, old_logp: Tensor, advantage: Tensor) -> Tensor:
        return policy_losses(logp - old_logp, advantage, 0.2)[0].sum()

    def with_logits(_: Case) -> None:
        logp = klft.token_logps(model(input_ids=ids).logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
        loss(logp, old, advantages).backward()

    def without(_: Case) -> None:
        with hidden_states(model) as kept:
            model(input_ids=ids)
        hidden, head = kept.hidden[:, :-1].flatten(0, 1), LMHead.from_model(model)
        fused_token_loss(
            lambda s, *rest: loss(s.logp, *rest), hidden, head, ids[:, 1:].flatten(), per_token=(old, advantages)
        ).backward()

    t = race([with_logits, without], c, rounds)
    model.zero_grad()
    bytes_with, bytes_without = peak(with_logits, c), peak(without, c)
    print(f"PPO micro-batch of 1024 tokens, a Llama of {model.num_parameters() / 1e6:.0f} M parameters, "
          f"V 32,768: time without logits x {ratio(t['without'], t['with_logits']):.2f}, "
          f"peak memory x {bytes_without / bytes_with:.2f}")  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = {f.__name__: f for f in (speed, growth, memory, processes, ppo, busy)}
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", nargs="+", choices=list(parts), default=list(parts))
    parser.add_argument("--peak", nargs=4, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.peak:
        name, *size = given.peak
        print(peak(globals()[name], Case(*map(int, size))))
        return
    card = torch.cuda.get_device_name() if CUDA else f"CPU, {torch.get_num_threads()} thread(s)"
    print(f"torch {torch.__version__}, {card}, {DTYPE}, load {os.getloadavg()[0]:.1f}", flush=True)
    for name in given.only:
        print(f"\n{parts[name].__doc__}", flush=True)
        parts[name](given.rounds)


if __name__ == "__main__":
    main()
