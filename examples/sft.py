"""SFTTrainer of TRL, anchored: the KL to the model it started from is in the loss, and every token's on a page.

python examples/sft.py                                   a tiny random model, seconds on a CPU
python examples/sft.py --model_name_or_path MODEL        a causal LM of yours
"""

import argparse
import copy

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl import SFTConfig, SFTTrainer

from klft import FrozenReference, KLAnchorMixin, KLPenalty

parser = argparse.ArgumentParser()
parser.add_argument("--model_name_or_path")
parser.add_argument("--output_dir", default="runs/sft")
parser.add_argument("--max_steps", type=int, default=40)
given = parser.parse_args()

torch.manual_seed(0)  # a model that is made here is the same on every process
if given.model_name_or_path:
    tokenizer = AutoTokenizer.from_pretrained(given.model_name_or_path, trust_remote_code=False)
    model = AutoModelForCausalLM.from_pretrained(given.model_name_or_path, dtype="float32", trust_remote_code=False)
else:
    words = ["<end>", "a", "good", "bad", "film", "story", "was", "this", "the"]
    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<end>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<end>", pad_token="<end>")
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(words), bos_token_id=None, eos_token_id=0, **sizes))


class AnchoredSFTTrainer(KLAnchorMixin, SFTTrainer):
    """SFTTrainer, with coef * KL per token in its loss."""


# KL(reference || policy), exact, on the tokens that are trained: what the model could say before, it should still say.
penalty = KLPenalty(
    FrozenReference(copy.deepcopy(model)), direction="forward", estimator="exact", placement="loss",
    coef=0.5,
)  # fmt: skip
args = SFTConfig(
    output_dir=given.output_dir, max_steps=given.max_steps, per_device_train_batch_size=8, learning_rate=3e-3,
    logging_steps=1, save_strategy="no", report_to="none", use_cpu=not torch.cuda.is_available(),
    gradient_checkpointing=False, disable_tqdm=True,
)  # fmt: skip
texts = Dataset.from_dict({"text": ["the film was good", "this story was good", "a film was bad"] * 20})
trainer = AnchoredSFTTrainer(
    model, args=args, train_dataset=texts, processing_class=tokenizer, penalty=penalty, measure_every=10
)
trainer.train()
for log in trainer.state.log_history[:-1]:
    print(f"step {log['step']:3}: loss {log['loss']:.3f}, KL {log['kl/forward/mean']:.4f} nats per token")
print(f"every token's KL, to look at: {given.output_dir}/kl/report.html")
trainer.accelerator.end_training()  # the end of a process group, if there is one
