"""What models come wrapped in: a stand-in for DeepSpeed's engine, torch.compile, and both around each other."""

import pytest
import torch
from torch import nn


class DeepSpeedEngine(nn.Module):
    """As deepspeed's: attributes come from the model inside, but `config` and `forward(*args)` are its own."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self._modules["module"] = model
        self.__dict__["module"] = model

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["module"], name)

    @property
    def config(self):
        return {"train_batch_size": 4}

    def forward(self, *inputs, **options):
        return self.module(*inputs, **options)


def compiled(model: nn.Module) -> nn.Module:
    """torch.compile, traced by dynamo and run eagerly: what inductor would make faster is the same graph."""
    return torch.compile(model, backend="eager")  # pyright: ignore


def compiled_in_place(model: nn.Module) -> nn.Module:
    model.compile(backend="eager")
    return model


def compiled_in_engine(model: nn.Module) -> nn.Module:
    return DeepSpeedEngine(compiled(model))


COMPILED = [compiled, compiled_in_place, compiled_in_engine]
WRAPPERS = [DeepSpeedEngine, *(pytest.param(wrapper, marks=pytest.mark.slow) for wrapper in COMPILED)]
