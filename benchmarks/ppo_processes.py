"""What PPO's processes share: the vocabulary (`kl_shard_vocab`), and the gathering of FSDP2's weights for generation.

    python benchmarks/ppo_processes.py heads [--hidden 64 256] [--calls 3]
    python benchmarks/ppo_processes.py generation [--vocab 512 32768] [--rounds 3]

gloo processes on one machine, one thread each. heads: scoring (`token_scores`) and the loss (`fused_token_loss`,
reverse KL, with the gradients of hidden states and head), V = 151,936, 256 tokens. "none": every process has both heads
whole and 256 tokens of its own. "dp": likewise, and computes with its rows of the heads, all tokens' (DDP). "dp rows":
holds only its rows (FSDP2). "tp": holds only its rows, and all have the same 256 tokens. Printed are the slowest
process's seconds, the largest peak above the imports, and the bytes that one receives per own token, counted at the
collectives. generation: `generate` of 8 x 32 tokens by a llama of 4 layers under fully_shard, within `gathered` and
without, in turn.
"""

import argparse
import contextlib
import resource
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

from klft import LMHead, VocabShard, fused_token_loss, token_scores

TOKENS, VOCAB_SIZE = 256, 151_936


class Run(NamedTuple):
    """What every process of a group must know."""

    part: str
    kind: str
    size: int
    repeats: int
    processes: int
    rendezvous: str


def held() -> float:
    """MiB resident now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 2**20


# --- the heads -------------------------------------------------------------------------------------------------------


class Traffic:
    """Bytes that this process receives in collectives, from what it asks for: a ring's, at the least."""

    def __init__(self):
        self.received = 0.0
        gather, scatter, reduce = dist.all_gather, dist.reduce_scatter, dist.all_reduce

        def all_gather(into: list[Tensor], t: Tensor, **more: Any) -> Any:
            self.received += (len(into) - 1) * t.nbytes
            return gather(into, t, **more)

        def reduce_scatter(into: Tensor, parts: list[Tensor], **more: Any) -> Any:
            self.received += (len(parts) - 1) * into.nbytes
            return scatter(into, parts, **more)

        def all_reduce(t: Tensor, **more: Any) -> Any:
            self.received += 2 * (1 - 1 / dist.get_world_size()) * t.nbytes
            return reduce(t, **more)

        dist.all_gather, dist.reduce_scatter, dist.all_reduce = all_gather, reduce_scatter, all_reduce


class Heads:
    """Hidden states and heads of one process."""

    def __init__(self, run: Run, rank: int):
        tokens = torch.Generator().manual_seed(0 if run.kind == "tp" else rank)
        self.hidden = torch.randn(TOKENS, run.size, generator=tokens)
        self.ref_hidden = self.hidden + 0.1 * torch.randn(TOKENS, run.size, generator=tokens)
        self.ids = torch.randint(0, VOCAB_SIZE, (TOKENS,), generator=tokens)
        self.hidden.requires_grad_()
        shard = VocabShard.even(VOCAB_SIZE, own_tokens=run.kind != "tp") if run.kind != "none" else None
        rows = VOCAB_SIZE if shard is None or run.kind == "dp" else shard.stop - shard.start
        rng = torch.Generator().manual_seed(7)
        self.weight = (torch.randn(rows, run.size, generator=rng).mul_(run.size**-0.5)).requires_grad_()
        ref_weight = torch.randn(rows, run.size, generator=rng).mul_(run.size**-0.5)
        self.shard, self.narrowed = shard, run.kind == "dp"
        self.ref_head = self._head(ref_weight)

    def _head(self, weight: Tensor) -> LMHead:
        if self.narrowed and self.shard is not None:
            return LMHead(weight).narrow(self.shard)
        return LMHead(weight, shard=self.shard)

    def inputs(self) -> dict[str, Any]:
        """What both functions take."""
        return {
            "hidden": self.hidden, "head": self._head(self.weight), "token_ids": self.ids,
            "ref_hidden": self.ref_hidden, "ref_head": self.ref_head,
        }  # fmt: skip

    def score(self) -> None:
        """Before the epochs."""
        with torch.no_grad():
            token_scores(**self.inputs())

    def loss(self) -> None:
        """In them."""
        self.hidden.grad = self.weight.grad = None
        fused_token_loss(lambda scores: scores.reverse_kl.sum(), **self.inputs()).backward()


def heads_of(run: Run, rank: int) -> dict[str, Any]:
    """Seconds of CPU and clock of both calls, medians; MiB at the peak; bytes received per own token."""
    base, found = held(), {}
    heads, traffic = Heads(run, rank), Traffic()
    for name, call in (("score", heads.score), ("loss", heads.loss)):
        call()
        traffic.received, times = 0.0, []
        for _ in range(run.repeats):
            if dist.is_initialized():
                dist.barrier()
            wall, cpu = time.perf_counter(), time.process_time()
            call()
            times.append((time.perf_counter() - wall, time.process_time() - cpu))
        for clock, values in zip(("wall", "cpu"), zip(*times, strict=True), strict=True):
            found[f"{name} {clock}"] = statistics.median(values)
            found[f"{name} {clock} most"] = max(values)
        found[f"{name} bytes per token"] = traffic.received / run.repeats / TOKENS
    return found | {"peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024 - base}


# --- generation ------------------------------------------------------------------------------------------------------


def generation_of(run: Run, _: int) -> dict[str, Any]:
    """Seconds per rollout, with and without gathered, round by round."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

    from klft.parallel import gathered

    torch.manual_seed(0)
    model: Any = LlamaForCausalLM(  # transformers' types hide its own generate
        LlamaConfig(
            vocab_size=run.size, hidden_size=256, intermediate_size=1024, num_hidden_layers=4, num_attention_heads=4,
            num_key_value_heads=4, max_position_embeddings=512, bos_token_id=None, eos_token_id=None, pad_token_id=0,
        )
    )  # fmt: skip
    mesh = init_device_mesh("cpu", (run.processes,))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    prompts = torch.randint(1, run.size, (8, 16))
    sampling = GenerationConfig(max_new_tokens=32, do_sample=True, top_k=0, pad_token_id=0)
    found: dict[str, list[float]] = {}
    for i in range(1 + run.repeats):
        for name in ("gathered", "sharded"):
            dist.barrier()
            wall, cpu = time.perf_counter(), time.process_time()
            with gathered(model) if name == "gathered" else contextlib.nullcontext():
                assert torch.as_tensor(model.generate(prompts, generation_config=sampling)).shape == (8, 48)
            if i:
                found.setdefault(f"{name} wall", []).append(time.perf_counter() - wall)
                found.setdefault(f"{name} cpu", []).append(time.process_time() - cpu)
    return found


# --- processes -------------------------------------------------------------------------------------------------------


def in_process(rank: int, run: Run, queue: Any) -> None:
    """One process of a group; each reports."""
    torch.set_num_threads(1)
    if run.processes > 1:
        dist.init_process_group("gloo", init_method=f"file://{run.rendezvous}", rank=rank, world_size=run.processes)
    queue.put((heads_of if run.part == "heads" else generation_of)(run, rank))
    if run.processes > 1:
        dist.barrier()
        dist.destroy_process_group()


def launched(*run: Any) -> list[dict[str, Any]]:
    """What every process of one group found."""
    queue = mp.get_context("spawn").SimpleQueue()
    with tempfile.TemporaryDirectory() as folder:
        made = Run(*run, rendezvous=f"{folder}/meet")
        mp.spawn(in_process, (made, queue), nprocs=made.processes)  # pyright: ignore
    return [queue.get() for _ in range(made.processes)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=["heads", "generation"])
    parser.add_argument("--hidden", type=int, nargs="+", default=[64, 256])
    parser.add_argument("--calls", type=int, default=3)
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--kinds", nargs="+", default=["none", "dp", "dp rows", "tp"])
    parser.add_argument("--vocab", type=int, nargs="+", default=[512, 32_768])
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    if args.part == "heads":
        groups = [(w, kind) for w in args.processes for kind in (args.kinds if w > 1 else ["none"])]
        for size in args.hidden:
            for processes, kind in groups:
                each = launched("heads", kind, size, args.calls, processes)
                most = {key: round(max(found[key] for found in each), 3) for key in each[0]}
                print(f"D {size}, {processes} process(es), {kind}: {most}", flush=True)
        return
    for vocab_size in args.vocab:
        found = launched("generation", "fsdp2", vocab_size, args.rounds, 2)[0]
        for clock in ("wall", "cpu"):
            pairs = list(zip(found[f"sharded {clock}"], found[f"gathered {clock}"], strict=True))
            ratios = [a / b for a, b in pairs]
            print(
                f"V {vocab_size}, {clock}: sharded {statistics.median(a for a, _ in pairs):.2f} s, gathered "
                f"{statistics.median(b for _, b in pairs):.2f} s, ratio {statistics.median(ratios):.2f} "
                f"({min(ratios):.2f} ... {max(ratios):.2f})",
                flush=True,
            )


if __name__ == "__main__":
    main()
