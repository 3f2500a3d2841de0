"""The dense divergences beside the formula people write, in one process: ratios of time, memory and error.

    python benchmarks/divergences.py [--rounds 5]

Plain is `sum p * (lp - lq)` on fp32 log_softmax under autograd, the form found in most trainers. Each round times every
contender once, in turn, so that a change of the machine's speed hits all of them alike; medians of the rounds' ratios.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

import klft

Divergence = Callable[[Tensor, Tensor], Tensor]  # (logits [N, V], ref_logits [N, V]) -> nats [N]


def plain(logits: Tensor, ref_logits: Tensor) -> Tensor:
    """KL(p||q) as it is usually written."""
    logp, ref_logp = logits.float().log_softmax(-1), ref_logits.float().log_softmax(-1)
    return (logp.exp() * (logp - ref_logp)).sum(-1)


CONTENDERS: dict[str, Divergence] = {
    "plain": plain,
    "reverse_kl": klft.reverse_kl,
    "forward_kl": klft.forward_kl,
    "jsd": klft.jsd,
}
SIZES = ((512, 32_768), (128, 151_936))  # tokens, vocabulary


def seconds(divergence: Divergence, logits: Tensor, ref_logits: Tensor) -> float:
    """Time of one forward and backward."""
    logits.grad = None
    start = time.perf_counter()
    divergence(logits, ref_logits).sum().backward()
    return time.perf_counter() - start


def saved_bytes(divergence: Divergence, logits: Tensor, ref_logits: Tensor) -> int:
    """Bytes kept alive between forward and backward, beside the inputs."""
    bytes_by_storage: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        bytes_by_storage[storage.data_ptr()] = storage.nbytes()  # views of one storage count once
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        divergence(logits, ref_logits)
    for given in (logits, ref_logits):
        bytes_by_storage.pop(given.untyped_storage().data_ptr(), None)
    return sum(bytes_by_storage.values())


def relative_error(divergence: Divergence, vocab_size: int) -> tuple[float, float, int]:
    """(true KL, largest relative error against float64, negative values) for two nearly equal models."""
    logits = torch.randn(64, vocab_size, generator=torch.Generator().manual_seed(0))
    noise = torch.randn(64, vocab_size, generator=torch.Generator().manual_seed(1))
    ref_logits = logits + 1e-3 * noise
    measured = divergence(logits, ref_logits)
    true = klft.reverse_kl(logits.double(), ref_logits.double())
    largest_error = ((measured - true) / true).abs().max().item()
    return true.mean().item(), largest_error, int((measured < 0).sum())


def compare_time_and_memory(tokens: int, vocab_size: int, *, rounds: int) -> None:
    """Print, for every contender, its time over plain's and the memory that it keeps for the backward."""
    logits, ref_logits = torch.randn(tokens, vocab_size, requires_grad=True), torch.randn(tokens, vocab_size)
    times: dict[str, list[float]] = {name: [] for name in CONTENDERS}
    for _ in range(rounds + 1):
        for name, divergence in CONTENDERS.items():
            times[name].append(seconds(divergence, logits, ref_logits=ref_logits))

    for name, divergence in CONTENDERS.items():
        # The first round only warms up.
        round_ratios = [own / base for own, base in zip(times[name][1:], times["plain"][1:], strict=True)]
        ratio = statistics.median(round_ratios)
        kept = saved_bytes(divergence, logits, ref_logits=ref_logits) / logits.nbytes
        print(f"N {tokens:4} V {vocab_size:7} {name:11} time {ratio:5.2f} x plain, keeps {kept:4.1f} x the logits")


def main() -> None:
    """Read the command line; compare time and memory, then error."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    rounds = parser.parse_args().rounds

    print(f"torch {torch.__version__}, {torch.get_num_threads()} thread(s), CPU, fp32")
    for tokens, vocab_size in SIZES:
        compare_time_and_memory(tokens, vocab_size, rounds=rounds)
    for name in ("plain", "reverse_kl"):
        kl, error, negative = relative_error(CONTENDERS[name], vocab_size=151_936)
        print(f"V 151936, true KL {kl:.1e}: {name:11} largest relative error {error:.1e}, {negative} of 64 negative")


if __name__ == "__main__":
    main()
