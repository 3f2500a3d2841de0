"""A world small enough to train in a second, made on the spot: tokenizers, models, prompts, rewards, a trainer.

The models' weights are drawn wide (not the usual 0.02), so that logits differ by units: a wrong position, temperature
or mask moves a log-probability by far more than any tolerance here.
"""

from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
    TrainerCallback,
)

from klft import PPOConfig, PPOTrainer
from klft.masked import token_logps

VOCABULARY = 32
PAD, BOS, EOS = 0, 1, 2

# w27 opens a user's turn, w28 an assistant's; the template writes the BOS itself.
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{{ ' w27 ' if m['role'] == 'user' else ' w28 ' }}{{ m['content'] }}"
    "{% endfor %}{% if add_generation_prompt %}{{ ' w28' }}{% endif %}"
)


def tokenizer(pad: str | None = "<pad>", adds_bos: bool = False, chat: bool = False) -> PreTrainedTokenizerFast:
    """One id per word: <pad> <bos> <eos> w0 ... w28. `pad="<eos>"` pads with the end token."""
    vocabulary = {"<pad>": PAD, "<bos>": BOS, "<eos>": EOS} | {f"w{i}": i + 3 for i in range(VOCABULARY - 3)}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if adds_bos:
        inner.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", BOS)])
    made = PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<bos>", eos_token="<eos>")
    if pad is not None:
        made.pad_token = pad
    if chat:
        made.chat_template = CHAT_TEMPLATE
    return made


def _llama_config(**changed: Any) -> LlamaConfig:
    return LlamaConfig(
        **{
            "vocab_size": VOCABULARY,
            "hidden_size": 16,
            "intermediate_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 64,
            "initializer_range": 0.25,
            "attention_dropout": 0.1,
            "bos_token_id": BOS,
            "eos_token_id": EOS,
            "pad_token_id": PAD,
        }
        | changed
    )


def llama(seed: int = 0, **changed: Any) -> LlamaForCausalLM:
    """Rotary positions, dropout in the attention."""
    torch.manual_seed(seed)
    return LlamaForCausalLM(_llama_config(**changed))


def gpt2(seed: int = 0, dropout: float = 0.1) -> GPT2LMHeadModel:
    """Learned absolute positions, dropout everywhere."""
    torch.manual_seed(seed)
    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=VOCABULARY,
            n_positions=64,
            n_embd=16,
            n_layer=2,
            n_head=4,
            initializer_range=0.25,
            resid_pdrop=dropout,
            embd_pdrop=dropout,
            attn_pdrop=dropout,
            bos_token_id=BOS,
            eos_token_id=EOS,
            pad_token_id=PAD,
        )
    )


def critic(seed: int = 1) -> LlamaForSequenceClassification:
    """A causal value model: a backbone of its own and one output."""
    torch.manual_seed(seed)
    return LlamaForSequenceClassification(_llama_config(num_labels=1))


def lora() -> Any:
    """An adapter on the attention; its B matrix starts at zero, so the policy starts as the base model."""
    from peft import LoraConfig

    return LoraConfig(r=2, lora_alpha=8, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")


def prompts(n: int = 64, **columns: list) -> Dataset:
    """Two to four words, all different."""
    words = [[f"w{i % 26}", f"w{(i * 7 + 3) % 26}", "w3", "w9"][: 2 + i % 3] for i in range(n)]
    return Dataset.from_dict({"prompt": [" ".join(w) for w in words], **columns})


def count_w5(completions: list, **_: Any) -> list[float]:
    """How often w5 is said, over 8."""
    return [sum(word == "w5" for word in text.split()) / 8 for text in completions]


def mixed(completion_ids: list, **_: Any) -> list[float]:
    """Something that differs from completion to completion."""
    return [((7 * sum(ids) + len(ids)) % 11) / 5 - 1 for ids in completion_ids]


def nothing(completions: list, **_: Any) -> list[float]:
    """0 for everyone."""
    return [0.0] * len(completions)


def config(folder: Path | str, **changed: Any) -> PPOConfig:
    """Settings of a quiet run on the CPU, one log per step."""
    return PPOConfig(
        **{
            "output_dir": str(folder),
            "use_cpu": True,
            "report_to": "none",
            "disable_tqdm": True,
            "save_strategy": "no",
            "logging_steps": 1.0,
            "learning_rate": 1e-2,
            "lr_scheduler_type": "constant",
            "per_device_train_batch_size": 4,
            "per_device_eval_batch_size": 4,
            "num_ppo_epochs": 1,
            "max_completion_length": 6,
        }
        | changed
    )


class Recorder(TrainerCallback):
    """Gradients as the optimizer sees them, and parameters after every step, by name."""

    def __init__(self):
        self.gradients: list[dict[str, torch.Tensor]] = []
        self.parameters: list[dict[str, torch.Tensor]] = []

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.gradients.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.parameters.append(parameters(model))


class SeenTrainer(PPOTrainer):
    """Keeps every micro-batch the loss was computed on, with the log-probabilities of that very forward."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        micro = inputs["rollout"]
        if not hasattr(self, "seen"):
            self.seen = []
        self.seen.append((micro, token_logps(outputs["logits"].detach(), micro.completion_ids), loss.detach()))
        return (loss, outputs) if return_outputs else loss


def trainer(
    folder: Path | str,
    model: Any = None,
    reward: Any = mixed,
    data: Dataset | None = None,
    kind: type[PPOTrainer] = PPOTrainer,
    given: dict | None = None,
    **changed: Any,
) -> Any:
    """A trainer of this world; `changed` goes to the config, `given` to the trainer."""
    return kind(
        **{
            "model": llama() if model is None else model,
            "reward_funcs": reward,
            "args": config(folder, **changed),
            "train_dataset": prompts() if data is None else data,
            "processing_class": tokenizer(),
        }
        | (given or {})
    )


def parameters(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """A copy of every parameter, by name."""
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def unequal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> list[str]:
    """Names of tensors that are not bit for bit the same (or only on one side)."""
    return sorted(n for n in a.keys() | b.keys() if n not in a or n not in b or not torch.equal(a[n], b[n]))


def step_logs(run: PPOTrainer) -> list[dict]:
    """What was logged after each optimizer step, without the wall clock."""
    return [entry for entry in run.state.log_history if "loss" in entry]
