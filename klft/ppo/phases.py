"""Where the time of a run goes, and on a GPU its memory: the phases of PPO as metrics.

    time/{generate,score,reward,train}/seconds    since the last log; train: forward and backward passes, no optimizer
    memory/{generate,score,reward,train}/peak_gib of the CUDA allocator; on a CPU there is none
    tokens_per_second                             of completions, on all processes, by the wall clock

Seconds and memory are of the process that logs. Each phase ends in a collective, so it has waited for the slowest.
"""

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch


class Phases:
    """Seconds and peak memory by phase. Evaluation is no phase of training: it has an object of its own."""

    def __init__(self):
        self.seconds: dict[str, float] = defaultdict(float)
        self.peak_gib: dict[str, float] = defaultdict(float)
        self.entered: Callable[[str], None] | None = None  # is told the phase that begins
        self.since: float | None = None  # when the tokens began to be made that the next log counts

    @contextmanager
    def __call__(self, name: str, device: torch.device) -> Iterator[None]:
        """Around a phase, or one of several parts of it, that computes on `device`."""
        start, cuda = time.perf_counter(), device.type == "cuda"
        if self.entered is not None:
            self.entered(name)
        self.since = start if self.since is None else self.since
        if cuda:
            torch.cuda.reset_peak_memory_stats(device)
        yield
        if cuda:
            torch.cuda.synchronize(device)  # what was only queued belongs here
            self.peak_gib[name] = max(self.peak_gib[name], torch.cuda.max_memory_allocated(device) / 2**30)
        self.seconds[name] += time.perf_counter() - start

    def take(self, tokens: int) -> dict[str, float]:
        """The metrics since the last log, in which `tokens` were generated; the next one starts at zero.

        Without a token the clock runs on: a rollout's epochs may be in later logs than the rollout.
        """
        metrics = {f"time/{name}/seconds": value for name, value in self.seconds.items()}
        metrics |= {f"memory/{name}/peak_gib": value for name, value in self.peak_gib.items()}
        if tokens and self.since is not None:
            since, self.since = self.since, time.perf_counter()
            metrics["tokens_per_second"] = tokens / (self.since - since)
        self.seconds.clear()
        self.peak_gib.clear()
        return metrics
