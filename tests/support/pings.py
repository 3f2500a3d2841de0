"""What a spawned process does instead of answering. It imports this file, and so nothing that takes long."""

import time


def dies(rank, folder):
    raise RuntimeError(f"rank {rank} has no network")


def hangs(rank, folder):
    time.sleep(60)
