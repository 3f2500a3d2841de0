"""PPO under DeepSpeed on two processes: ZeRO-2 gives the parameters of DDP, ZeRO-3 is refused before a model is loaded.

A loop that takes its KL from logits goes with ZeRO-3 too.

DeepSpeed is no dependency of klft: without it the tests that run it are skipped. On a CPU accelerate leaves DeepSpeed
out; here the state says there were GPUs once gloo is connected, so that DeepSpeed's own engine and optimizer run. Real
are the split gradients and optimizer state; not real are CUDA, NCCL and 16 bit. To run them without installing it:

    DS_BUILD_OPS=0 pip install --no-deps --target FOLDER deepspeed hjson ninja py-cpuinfo msgpack einops
    PYTHONPATH=.:FOLDER pytest -m '' tests/ppo/test_ppo_deepspeed.py

Run as a script, this file is what each process does.
"""

import importlib.util
import os
import sys
from pathlib import Path
from types import SimpleNamespace

import conftest  # noqa: F401 - also for the script: no hub, few threads
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DeepSpeedPlugin
from support import tiny
from support.processes import launch, leave

from klft import FixedKL, KLPenalty
from klft.integrations.checks import check_anchor
from klft.parallel import why_no_zero3

needs_deepspeed = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="deepspeed is not installed"),
]
KINDS = ("ddp", "zero2", "zero3")
REFUSED = "kept elsewhere by ZeRO-3 .*: use FSDP2, which splits the weights too, or ZeRO-2"


# ---- what each process does ----------------------------------------------------------------------------------------


def pretend(stage):
    """gloo is connected: from here on DeepSpeed is what the launcher asked for."""
    import deepspeed

    os.environ |= {"ACCELERATE_USE_CPU": "false", "ACCELERATE_USE_DEEPSPEED": "true", "DS_ACCELERATOR": "cpu"}
    os.environ["ACCELERATE_DEEPSPEED_ZERO_STAGE"] = str(stage)
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # C++ that would be compiled now; gloo does the same


class Broken(tiny.PPOTrainer):
    """A gradient that is not finite in the second process's second step, of a loss that is."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        loss = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        if self.args.process_index == 1 and self.state.global_step == 1:
            loss.register_hook(lambda gradient: gradient * torch.inf)
        return loss


def trained(folder, steps, resume=None, kind=tiny.PPOTrainer, **changed):
    """Two micro-batches to a step, two steps to a pass, two passes to a rollout; gradients are clipped."""
    args = tiny.config(
        folder, max_steps=steps, num_ppo_epochs=2, num_mini_batches=2, per_device_train_batch_size=2,
        gradient_accumulation_steps=2, max_grad_norm=0.5, self_test=True, save_strategy="steps", save_steps=1.0,
        **changed,
    )  # fmt: skip
    run = kind(tiny.llama(), tiny.mixed, args, tiny.prompts(), processing_class=tiny.tokenizer())
    error = None
    try:
        run.train(resume_from_checkpoint=resume)
    except RuntimeError as caught:
        error = str(caught)
    saved = sorted(p.name for p in folder.glob("checkpoint-*"))
    logs = [(log["loss"], log["grad_norm"]) for log in tiny.step_logs(run)]
    return {
        "parameters": tiny.parameters(run.model), "logs": logs, "error": error, "saved": saved,
        "kind": run.accelerator.distributed_type.value, "precision": run.accelerator.mixed_precision,
    }  # fmt: skip


def loop(stage=None):
    """A loop of one's own, four steps of exact KL from logits: the parameters, gathered."""
    plugin, clipped = None, {"gradient_accumulation_steps": 1, "gradient_clipping": 1.0}
    if stage:
        pretend(stage)
        plugin = DeepSpeedPlugin(zero_stage=stage, zero3_init_flag=False, **clipped)
        plugin.deepspeed_config |= {"train_micro_batch_size_per_gpu": 4, "zero_allow_untested_optimizer": True}
    accelerator = Accelerator(deepspeed_plugin=plugin)
    policy = tiny.llama(attention_dropout=0.0)
    penalty = KLPenalty(tiny.apart(), estimator="exact", placement="loss", controller=FixedKL(1.0))
    model, optimizer = accelerator.prepare(policy, torch.optim.AdamW(policy.parameters(), lr=1e-2))
    for step in range(4):
        generator = torch.Generator().manual_seed(2 * step + accelerator.process_index)
        ids = torch.randint(3, tiny.VOCABULARY, (4, 9), generator=generator)
        real, counted = torch.ones_like(ids), torch.ones_like(ids, dtype=torch.bool)
        counted[:, 0] = False
        kl = penalty.measure(model(input_ids=ids, attention_mask=real).logits, ids, real, counted)
        accelerator.backward(penalty.losses(kl).sum() / kl.mask.sum())
        if not stage:
            accelerator.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    if not stage:
        return tiny.parameters(policy)
    import deepspeed

    with deepspeed.zero.GatheredParameters(list(policy.parameters())):
        return tiny.parameters(policy)


def worker(name, folder):
    assert tiny.config(folder).distributed_state is not None
    if name == "zero3":
        torch.save({"loop": loop(3)}, folder / f"{name}.{os.environ['RANK']}.pt")
        return
    if name == "zero2":
        pretend(2)
    found = {"whole": trained(folder / name, 6), "broken": trained(folder / f"broken-{name}", 3, kind=Broken)}
    found["rest"] = trained(folder / f"rest-{name}", 6, str(folder / name / "checkpoint-3"))
    AcceleratorState._reset_state()  # one precision for each, as a process has
    found["bf16"] = trained(folder / f"bf16-{name}", 2, bf16=True)
    if name == "ddp":
        AcceleratorState._reset_state()
        found["loop"] = loop()
    torch.save(found, folder / f"{name}.{os.environ['RANK']}.pt")


# ---- the tests -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("deepspeed")
    for name in KINDS:
        done = launch(__file__, name, folder, timeout=300)
        assert done.returncode == 0, done.stderr[-6000:]
    return {n: [torch.load(folder / f"{n}.{r}.pt", weights_only=False) for r in (0, 1)] for n in KINDS}


def largest_difference(mine, theirs):
    assert mine.keys() == theirs.keys()
    return max(float((mine[name] - theirs[name]).abs().max()) for name in mine)


class TestZero2:
    pytestmark = needs_deepspeed

    def test_trains_what_ddp_trains(self, runs, tmp_path):
        """Gradients are summed in another order, in flat buffers: 2e-7 in float32 after six steps."""
        assert {each["whole"]["kind"] for each in runs["ddp"]} == {"MULTI_CPU"}
        start = tiny.parameters(tiny.trainer(tmp_path).model)
        for ddp, zero in zip(runs["ddp"], runs["zero2"], strict=True):
            assert zero["whole"]["kind"] == "DEEPSPEED"
            assert largest_difference(start, ddp["whole"]["parameters"]) > 1e-2
            assert largest_difference(ddp["whole"]["parameters"], zero["whole"]["parameters"]) <= 1e-5
            assert len(ddp["whole"]["logs"]) == 6
            for mine, theirs in zip(ddp["whole"]["logs"], zero["whole"]["logs"], strict=True):
                assert mine == pytest.approx(theirs, rel=1e-4, abs=1e-5)

    def test_resumes_within_a_rollout(self, runs):
        for each in runs["zero2"]:
            assert largest_difference(each["whole"]["parameters"], each["rest"]["parameters"]) <= 1e-6
            assert each["whole"]["logs"] == each["rest"]["logs"]

    def test_trains_a_policy_that_deepspeed_keeps_in_16_bit(self, runs):
        """The losses of DDP's autocast, to what bf16 has of digits; the value head is in 16 bit there too."""
        for name, dtype in (("ddp", torch.float32), ("zero2", torch.bfloat16)):
            assert runs[name][0]["bf16"]["precision"] == "bf16"
            assert {p.dtype for p in runs[name][0]["bf16"]["parameters"].values()} == {dtype}
        ddp, zero = (runs[name][0]["bf16"] for name in ("ddp", "zero2"))
        for mine, theirs in zip(ddp["logs"], zero["logs"], strict=True):
            assert mine == pytest.approx(theirs, rel=3e-2, abs=1e-2)

    @pytest.mark.parametrize("name", ["ddp", "zero2"])
    def test_stops_at_a_gradient_that_is_not_finite(self, name, runs):
        for each in runs[name]:
            assert "the gradient is not finite at step 1" in each["broken"]["error"]
            assert "checkpoint-1" in each["broken"]["error"]
            assert each["broken"]["saved"] == ["checkpoint-1"]


class TestZero3:
    pytestmark = needs_deepspeed

    def test_a_loop_from_logits_trains_what_it_trains_under_ddp(self, runs):
        start = tiny.parameters(tiny.llama())
        for ddp, zero in zip(runs["ddp"], runs["zero3"], strict=True):
            assert largest_difference(start, ddp["loop"]) > 1e-2
            assert largest_difference(ddp["loop"], zero["loop"]) <= 1e-5


# ---- refusals ------------------------------------------------------------------------------------------------------


def zero(stage):
    return SimpleNamespace(deepspeed_plugin=SimpleNamespace(zero_stage=stage))


@pytest.mark.parametrize("args", [zero(1), zero(2), SimpleNamespace(deepspeed_plugin=None), SimpleNamespace()])
def test_what_is_not_zero3_is_not_refused(args):
    assert why_no_zero3(args) is None


def test_zero3_is_refused_before_a_model_is_loaded(tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_ZERO_STAGE", "3")
    monkeypatch.setattr(DeepSpeedPlugin, "set_deepspeed_weakref", lambda _: None)  # needs deepspeed itself
    with pytest.raises(ValueError, match=f"PPOConfig: .*{REFUSED}"):
        tiny.config(tmp_path)


def test_zero3_is_refused_in_the_mixin():
    with pytest.raises(ValueError, match=f"KLAnchorMixin: .*{REFUSED}"):
        check_anchor(SimpleNamespace(args=zero(3)), None, 0)


if __name__ == "__main__":
    worker(sys.argv[1], Path(sys.argv[2]))
    leave()
