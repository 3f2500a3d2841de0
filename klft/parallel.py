"""Weights that are split over processes: read, gathered; a frozen model's split or offloaded; and whether they are."""

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, StateDictType, fully_shard
from torch.distributed.tensor import DTensor, Partial

from klft.sharding import VocabShard

if TYPE_CHECKING:
    from accelerate import Accelerator
    from transformers import Trainer, TrainingArguments

ModelPlacement = Literal["replicated", "sharded", "offloaded"]
PLACEMENTS: tuple[ModelPlacement, ...] = get_args(ModelPlacement)
_kept: WeakKeyDictionary[nn.Module, list[FSDPModule]] = WeakKeyDictionary()  # units that stay gathered after a forward


def check_parallelism(args: "TrainingArguments", accelerator: "Accelerator", policy: nn.Module) -> None:
    """Raise ValueError where FSDP, DeepSpeed or tensor parallelism was asked for and something else runs.

    On a CPU accelerate makes DDP of a wish for FSDP without a word. Tensor parallelism is there once a model is loaded
    with it: `policy` is as it was loaded, not yet wrapped.
    """
    runs = accelerator.distributed_type.value
    asked = [
        kind for kind, given in (("FSDP", args.fsdp), ("DEEPSPEED", args.deepspeed))
        if (given or os.environ.get(f"ACCELERATE_USE_{kind}") == "true") and runs != kind
    ]  # fmt: skip
    config = getattr(accelerator, "parallelism_config", None)
    tp_size = getattr(config, "tp_size", None) or int(os.environ.get("PARALLELISM_CONFIG_TP_SIZE", 1))
    split = any(isinstance(p, DTensor) for p in policy.parameters())
    if tp_size > 1 and not split:
        asked.append(f"tensor parallelism over {tp_size} processes")
    plan: dict[str, str] = getattr(policy, "tp_plan", None) or {}
    if split and args.gradient_accumulation_steps > 1 and "replicated_with_grad_allreduce" in plan.values():
        raise ValueError(
            f"{type(policy).__name__} under tensor parallelism: transformers sums the gradients of its replicated "
            "norms anew with every micro-batch, those of earlier ones again. Take gradient_accumulation_steps=1"
        )
    if asked:
        raise ValueError(
            f"{asked[0]} was asked for and {runs} runs: every process would hold whole models. Launch FSDP and "
            "DeepSpeed on GPUs with accelerate launch; load a model for tensor parallelism with "
            "from_pretrained(..., distributed_config=DistributedConfig(tp_size=N)); or leave it out"
        )


def reshard(model: nn.Module) -> None:
    """Give back what FSDP2 has gathered and keeps: `named_parameters` are then what the optimizer holds, and the next
    forward reads them.
    """
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


@contextmanager
def gathered(model: nn.Module) -> Iterator[None]:
    """Inside, every process holds the whole of what FSDP2 has split, and a forward needs no other process.

    For `generate`, whose forwards differ in number from process to process: each would gather anew, and wait for those
    of a process that has ended. Takes the memory of the whole weights. All processes must enter; the first time one
    small forward is made. Nothing is changed where no unit is split.
    """
    units = [module for module in model.modules() if isinstance(module, FSDPModule)]
    if units and model not in _kept:  # FSDP2 can be told whether a unit is given back after a forward, and not asked
        reshard(model)
        _probe(model)
        _kept[model] = [unit for unit in units if not any(isinstance(p, DTensor) for p in _own_parameters(unit))]
    try:
        for unit in units:
            unit.set_reshard_after_forward(False, recurse=False)
            unit.unshard()
        yield
    finally:
        for unit in units:
            if unit not in _kept[model]:
                unit.set_reshard_after_forward(True, recurse=False)
        reshard(model)


def _own_parameters(unit: nn.Module) -> Iterator[nn.Parameter]:
    """Those that no unit within it holds."""
    yield from unit.parameters(recurse=False)
    for child in unit.children():
        if not isinstance(child, FSDPModule):
            yield from _own_parameters(child)


class Placement:
    """Where the weights of a frozen model lie.

    replicated: whole, on every process's device. sharded: split over all processes by FSDP2; each layer is gathered
    when it is computed, so all processes must make the same forwards. offloaded: on the CPU, copied to the device for
    each forward. Raises ValueError for another kind, and for a model that cannot be moved.
    """

    def __init__(self, model: nn.Module, kind: str = "replicated"):
        if kind not in PLACEMENTS:
            raise ValueError(f"placement must be one of {', '.join(PLACEMENTS)}, got {kind!r}")
        self.model, self.kind = model, kind
        self.device: torch.device | None = None  # where what is offloaded is computed
        self._on_cpu: list[tuple[Tensor, Tensor]] = []

    def to(self, device: torch.device | str) -> None:
        """Compute on `device` from now on. A collective, the first time, where it is sharded.

        A quantised model, and one that is spread over devices already, stays where it is.
        """
        spread = getattr(self.model, "hf_device_map", None) or any(p.is_meta for p in self.model.parameters())
        if spread or getattr(self.model, "is_quantized", False):
            if self.kind != "replicated":
                raise ValueError(f"placement={self.kind!r}: {type(self.model).__name__} is quantised or spread already")
            return
        device = torch.device(device)
        if self.kind == "offloaded":
            self.model.to("cpu")
            tensors = [*self.model.parameters(), *self.model.buffers()]
            self.device, pin = device, device.type == "cuda"
            for tensor in tensors if pin else ():
                tensor.data = tensor.data.pin_memory()
            self._on_cpu = [(t, t.data) for t in tensors]
        elif self.kind == "sharded" and dist.is_initialized() and dist.get_world_size() > 1:
            if not isinstance(self.model, FSDPModule):
                _shard(self.model, device)
        else:
            self.model.to(device)

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """Around a forward, and reading the head after it."""
        for tensor, kept in self._on_cpu:
            tensor.data = kept.to(self.device or "cpu", copy=True, non_blocking=True)
        try:
            yield
        finally:
            for tensor, kept in self._on_cpu:
                tensor.data = kept
            if self.kind == "sharded":
                reshard(self.model)


def _shard(model: nn.Module, device: torch.device) -> None:
    """Every layer an FSDP2 unit, and the backbone and what is around it; all are given back after a forward."""
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    body: nn.Module = getattr(model, "base_model", model)
    head: nn.Module | None = getattr(model, "get_output_embeddings", lambda: None)()
    tied = head is not None and any(p is q for p in head.parameters() for q in body.parameters())
    for layer in _layers(body):
        fully_shard(layer, mesh=mesh, reshard_after_forward=True)
    if body is not model:  # a unit of its own, since hidden states are also asked of it alone
        fully_shard([body, head] if tied and head is not None else body, mesh=mesh, reshard_after_forward=True)
    fully_shard(model, mesh=mesh, reshard_after_forward=True)
    _probe(model)  # FSDP2 takes what makes the first forward for the root


def _layers(module: nn.Module) -> Iterator[nn.Module]:
    """The members of the outermost lists of modules."""
    for child in module.children():
        yield from child if isinstance(child, nn.ModuleList) else _layers(child)


@torch.no_grad()
def _probe(model: nn.Module) -> None:
    """A forward of two tokens, on all processes together."""
    ids = torch.zeros(1, 2, dtype=torch.long, device=next(model.parameters()).device)
    model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)


def total_norm(gradients: Iterable[Tensor]) -> Tensor:
    """The 2-norm of all gradients together, the same on every process. Under tensor parallelism some are split."""
    groups: dict[object, list[Tensor]] = {}
    for gradient in gradients:
        groups.setdefault(gradient.device_mesh if isinstance(gradient, DTensor) else None, []).append(gradient)
    norms = [torch.nn.utils.get_total_norm(group) for group in groups.values()]  # it takes no DTensors among others
    return torch.nn.utils.get_total_norm([n.full_tensor() if isinstance(n, DTensor) else n for n in norms])


def placed(
    model: nn.Module, weight: Tensor, bias: Tensor | None, shard_rows: bool
) -> tuple[Tensor, Tensor | None, VocabShard | None]:
    """(weight, bias, shard) as plain tensors whose gradients reach the parameters with the right size."""
    if not isinstance(weight, DTensor):
        if shard_rows:
            raise ValueError("LMHead.from_model: shard_rows: the head is whole here; read it before FSDP2 gathers it")
        return weight, bias, None
    assert bias is None or isinstance(bias, DTensor)
    mesh = weight.device_mesh
    same_tokens = "tp" in (mesh.mesh_dim_names or ()) or not any(isinstance(m, FSDPModule) for m in model.modules())
    if not (same_tokens or shard_rows):  # by default full_tensor keeps this process's own gradient only
        mean = {"grad_placements": [Partial("avg")] * mesh.ndim}
        return weight.full_tensor(**mean), None if bias is None else bias.full_tensor(**mean), None
    shard = VocabShard.from_dtensor(weight, own_tokens=not same_tokens)
    weight, bias = weight.to_local(), None if bias is None else bias.to_local()
    for tensor in (weight, bias):
        if tensor is not None and tensor.requires_grad and not same_tokens:
            tensor.register_hook(lambda gradient: gradient / mesh.size())  # a sum over processes; FSDP2 takes averages
    return weight, bias, shard


def save_gathered(trainer: "Trainer", folder: Path) -> None:
    """The whole policy, where the Trainer saves none: under FSDP with sharded state dicts. All processes must call."""
    plugin = trainer.accelerator.state.fsdp_plugin if trainer.is_fsdp_enabled else None
    if plugin is None or plugin.state_dict_type == StateDictType.FULL_STATE_DICT:
        return
    weights = trainer.accelerator.get_state_dict(trainer.model)
    if trainer.args.should_save:
        model: Any = trainer.accelerator.unwrap_model(trainer.model)
        model.save_pretrained(folder, state_dict=weights)
        if trainer.processing_class is not None:
            trainer.processing_class.save_pretrained(folder)


def why_no_zero3(args: object) -> str | None:
    """Why klft's trainers do not go with DeepSpeed's ZeRO-3, if the TrainingArguments ask for it; else None."""
    if getattr(getattr(args, "deepspeed_plugin", None), "zero_stage", None) != 3:
        return None
    return (
        "the weight of the vocabulary head is kept elsewhere by ZeRO-3 outside of the model's forward, and the KL is "
        "read off it there: use FSDP2, which splits the weights too, or ZeRO-2"
    )
