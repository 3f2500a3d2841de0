"""Weights that are split over processes, as plain tensors."""

from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Partial

from klft.sharding import VocabShard


def reshard(model: nn.Module) -> None:
    """Give back what FSDP2 has gathered and keeps: `named_parameters` are then what the optimizer holds, and the next
    forward reads them.
    """
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


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
