"""What every test shares: no hub, few threads, and the processes-on-CPU switch of accelerate."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ["ACCELERATE_USE_CPU"] = "true"

import pytest
import torch

pytest.register_assert_rewrite("support")
torch.set_num_threads(int(os.environ.get("KLFT_TEST_THREADS", "1")))
