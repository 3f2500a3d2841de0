"""An exact KL penalty in a training loop of your own: python examples/own_loop.py [--model_name_or_path MODEL]"""

import argparse
import copy

import torch
from accelerate import Accelerator
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import klft

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--model_name_or_path", help="any causal LM; without it a tiny one is made")
parser.add_argument("--max_steps", type=int, default=60, help="optimizer steps of two micro-batches")
arguments = parser.parse_args()

# A policy, and as its reference a copy that is made before anything moves.
torch.manual_seed(0)
accelerator = Accelerator(gradient_accumulation_steps=2)
if arguments.model_name_or_path:
    policy = AutoModelForCausalLM.from_pretrained(arguments.model_name_or_path, trust_remote_code=False)
else:
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    policy = LlamaForCausalLM(LlamaConfig(vocab_size=100, pad_token_id=0, bos_token_id=None, eos_token_id=1, **sizes))
reference = klft.FrozenReference(copy.deepcopy(policy))
reference.to(accelerator.device)
controller = klft.PIController(1.0, target=2.0, kp=0.2, ki=0.02)  # holds the KL at 2 nats per sequence
penalty = klft.KLPenalty(reference, estimator="exact", placement="loss", controller=controller)

# Two texts to learn, right-padded; their first four tokens are the prompt.
texts = torch.tensor([[5, 6, 7, 8, 9, 10, 11, 12, 9, 10, 11, 1], [5, 6, 7, 8, 11, 12, 9, 10, 11, 1, 0, 0]])
batches = torch.utils.data.DataLoader(list(texts.repeat(4, 1)), batch_size=4)
optimizer = torch.optim.AdamW(policy.parameters(), lr=3e-3)
policy, optimizer, batches = accelerator.prepare(policy, optimizer, batches)
for check in klft.check_setup(policy, reference, optimizer=optimizer, starts_equal=True):
    accelerator.print(f"{check.status:8} {check.name}: {check.text}")

for step in range(arguments.max_steps):
    for ids in batches:
        with accelerator.accumulate(policy):
            attention_mask = (ids != 0).long()
            with klft.hidden_states(policy) as kept:  # no logits are made
                policy(**klft.causal_inputs(policy, ids, attention_mask))
            ref_hidden, ref_head = reference.hidden(ids, attention_mask)

            # The position before a token predicts it, so everything is shifted by one. Prompt and padding do not count.
            mask = (attention_mask[:, 1:] == 1) & (torch.arange(1, ids.shape[1], device=ids.device) >= 4)
            hidden, head = kept.hidden[:, :-1], klft.LMHead.from_model(policy)
            kl = penalty.measure_hidden(hidden, head, ids[:, 1:], mask, ref_hidden[:, :-1], ref_head)
            nll = klft.masked_mean(-kl.scores.logp, mask)
            accelerator.backward(nll + klft.masked_mean(penalty.losses(kl), mask))
            optimizer.step()
            optimizer.zero_grad()
            if accelerator.sync_gradients:
                penalty.update(kl)  # nats per sequence of this micro-batch, over all processes
    if step % 10 == 9 or step + 1 == arguments.max_steps:
        nats = kl.metrics(all_processes=True)["kl/sequence/reverse/mean"]
        accelerator.print(f"step {step + 1}: NLL {nll:.3f}, KL {nats:.2f} nats per sequence, coef {penalty.coef:.3f}")
accelerator.end_training()
