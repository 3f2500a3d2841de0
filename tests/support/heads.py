"""A small Llama, its own logits with their gradients, and the same through hidden states and its head."""

import torch
import transformers

from klft.heads import LMHead
from klft.models import hidden_states

V = 37
IDS = torch.randint(3, V, (2, 5), generator=torch.Generator().manual_seed(0))

LLAMA_LIKE = {
    "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 4, "max_position_embeddings": 32, "initializer_range": 0.3,
}  # fmt: skip
SMALL = {"vocab_size": V, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}


def llama(dtype=torch.float64, **changed):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**SMALL | LLAMA_LIKE | changed)
    return transformers.LlamaForCausalLM(config).to(dtype).eval()


def gradients(model):
    found = {n: None if p.grad is None else p.grad.clone() for n, p in model.named_parameters()}
    model.zero_grad(set_to_none=True)
    return found


def projection(logits):
    weights = torch.randn(logits.shape, generator=torch.Generator().manual_seed(1), dtype=logits.dtype)
    return (logits * weights).sum()


def own(model, **inputs):
    """The model's own logits, and the gradients of a projection of them."""
    logits = model(input_ids=IDS, **inputs).logits
    projection(logits).backward()
    return logits.detach(), gradients(model)


def read(model, **inputs):
    """The same through hidden states and the head."""
    with hidden_states(model) as kept:
        output = model(input_ids=IDS, **inputs)
    assert output.logits.shape[-2] == 0, "no logits were computed"
    head = LMHead.from_model(model)
    logits = head.logits(kept.hidden)
    projection(logits).backward()
    return logits.detach(), gradients(model), head


def hooks_of(model):
    return [(m, len(m._forward_pre_hooks), len(m._forward_hooks)) for m in model.modules()]
