"""The dense divergences beside the formula people write, in one process: ratios of time, memory and error.

    python benchmarks/divergences.py [--rounds 5]

Plain is `sum p * (lp - lq)` on fp32 log_softmax under autograd, the form found in most trainers. Each round times every
contender once, in turn, so that a change of the machine's speed hits all of them alike; medians of the rounds' ratios.
"""

import argparse
import statistics
import time

import torch

import klft


def plain(logits: torch.Tensor, ref_logits: torch.Tensor) -> torch.Tensor:
    """KL(p||q) as it is usually written."""
    lp, lq = logits.float().log_softmax(-1), ref_logits.float().log_softmax(-1)
    return (lp.exp() * (lp - lq)).sum(-1)


def seconds(f, logits: torch.Tensor, ref_logits: torch.Tensor) -> float:
    """Forward and backward once."""
    logits.grad = None
    start = time.perf_counter()
    f(logits, ref_logits).sum().backward()
    return time.perf_counter() - start


def saved_bytes(f, logits: torch.Tensor, ref_logits: torch.Tensor) -> int:
    """Bytes kept alive between forward and backward, beside the inputs."""
    kept: dict[int, int] = {}

    def note(t: torch.Tensor) -> torch.Tensor:
        kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
        f(logits, ref_logits)
    for given in (logits, ref_logits):
        kept.pop(given.untyped_storage().data_ptr(), None)
    return sum(kept.values())


def relative_error(f, vocab_size: int) -> tuple[float, float, int]:
    """(true KL, largest relative error against float64, negative values) for two nearly equal models."""
    z = torch.randn(64, vocab_size, generator=torch.Generator().manual_seed(0))
    y = z + 1e-3 * torch.randn(64, vocab_size, generator=torch.Generator().manual_seed(1))
    got = f(z, y)
    true = klft.reverse_kl(z.double(), y.double())
    return true.mean().item(), ((got - true) / true).abs().max().item(), int((got < 0).sum())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    rounds = parser.parse_args().rounds
    print(f"torch {torch.__version__}, {torch.get_num_threads()} thread(s), CPU, fp32")
    contenders = {"plain": plain, "reverse_kl": klft.reverse_kl, "forward_kl": klft.forward_kl, "jsd": klft.jsd}
    for n, v in ((512, 32_768), (128, 151_936)):
        logits, ref_logits = torch.randn(n, v, requires_grad=True), torch.randn(n, v)
        times = {name: [] for name in contenders}
        for _ in range(rounds + 1):
            for name, f in contenders.items():
                times[name].append(seconds(f, logits, ref_logits))
        for name, f in contenders.items():
            ratio = statistics.median(t / p for t, p in zip(times[name][1:], times["plain"][1:], strict=True))
            kept = saved_bytes(f, logits, ref_logits) / logits.nbytes
            print(f"N {n:4} V {v:7} {name:11} time {ratio:5.2f} x plain, keeps {kept:4.1f} x the logits")
    for name, f in (("plain", plain), ("reverse_kl", klft.reverse_kl)):
        kl, error, negative = relative_error(f, 151_936)
        print(f"V 151936, true KL {kl:.1e}: {name:11} largest relative error {error:.1e}, {negative} of 64 negative")


if __name__ == "__main__":
    main()
