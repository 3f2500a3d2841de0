"""GRPOTrainer of TRL with an exact KL: a token's own in the loss, that of the later ones in its advantage.

python examples/grpo.py                                   a tiny random model, seconds on a CPU
python examples/grpo.py --model_name_or_path MODEL        a causal LM of yours
"""

import argparse
import copy

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl import GRPOConfig, GRPOTrainer

from klft import FrozenReference, KLAnchorMixin, KLPenalty

parser = argparse.ArgumentParser()
parser.add_argument("--model_name_or_path")
parser.add_argument("--output_dir", default="runs/grpo")
parser.add_argument("--max_steps", type=int, default=40)
given = parser.parse_args()
torch.manual_seed(0)  # a model that is made here is the same on every process
if given.model_name_or_path:
    tokenizer = AutoTokenizer.from_pretrained(given.model_name_or_path, trust_remote_code=False)
    policy = AutoModelForCausalLM.from_pretrained(given.model_name_or_path, dtype="float32", trust_remote_code=False)
else:
    words = ["<end>", "a", "good", "bad", "film", "story", "was", "this", "the"]
    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<end>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<end>", pad_token="<end>")
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    policy = LlamaForCausalLM(LlamaConfig(vocab_size=len(words), bos_token_id=None, eos_token_id=0, **sizes))


def says_good(completions, **_):  # the reward
    return [text.split().count("good") for text in completions]


class AnchoredGRPOTrainer(KLAnchorMixin, GRPOTrainer):
    """GRPOTrainer, with coef * KL in its loss and its advantages."""


reference = FrozenReference(copy.deepcopy(policy))
penalty = KLPenalty(reference, estimator="exact", placement="both", coef=0.1)
args = GRPOConfig(
    output_dir=given.output_dir, max_steps=given.max_steps, beta=0.0, per_device_train_batch_size=16, num_generations=4,
    max_completion_length=8, learning_rate=3e-3, logging_steps=1, save_strategy="no", report_to="none",
    use_cpu=not torch.cuda.is_available(), gradient_checkpointing=False, disable_tqdm=True,
)  # fmt: skip
prompts = Dataset.from_dict({"prompt": ["the film was", "this story was", "a film"] * 20})
trainer = AnchoredGRPOTrainer(
    policy, reward_funcs=[says_good], args=args, train_dataset=prompts, processing_class=tokenizer, penalty=penalty
)
trainer.train()
for log in trainer.state.log_history[:-1]:
    good, nats = log["rewards/says_good/mean"], log["kl/sequence/reverse/mean"]
    print(f"step {log['step']:3}: good {good:.2f}, KL {nats:.3f} nats per completion")
trainer.accelerator.end_training()  # the end of a process group, if there is one
