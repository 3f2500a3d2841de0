"""PPO under a KL penalty: a small language model learns to write positive product reviews and stays near its reference.

    accelerate launch --config_file accelerate_config.yaml recipes/ppo_reviews.py --config recipes/ppo_reviews.yaml

Everything it needs is made on the spot and cached (recipes/reviews.py). With your own:

    --model_name_or_path any/causal-lm  --dataset_name any/dataset-or-file.jsonl (a `prompt` column)
    --reward any/reward-model [--reward_label positive]  or  --reward module:function  --use_peft
Prints the KL table by step, and what both models say. Last time, on two CPU cores and two processes: see README.md.
"""

import pkgutil
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from datasets import load_dataset
from reviews import ensure_world
from rich.console import Console
from rich.table import Table
from rich.text import Text
from transformers import AutoModelForCausalLM, AutoTokenizer, ProgressCallback, pipeline
from trl import ModelConfig, ScriptArguments, get_peft_config

from klft import PPOConfig, PPOTrainer
from klft.cli import one_line_errors, parse_arguments
from klft.ppo import RewardModel, checkpoint_to_resume


@dataclass
class RecipeArguments(ScriptArguments):
    """What to train on and for; PPOConfig and trl's ModelConfig hold the rest."""

    reward: str | None = field(default=None, metadata={"help": "Reward model (id or path), or module:function."})
    reward_label: str | None = field(default=None, metadata={"help": "Label whose probability is the reward."})
    processes: int | None = field(default=None, metadata={"help": "Stop unless this many processes run."})
    trust_remote_code: bool = field(default=False, metadata={"help": "Run code that a model's repository brings."})
    smoke: bool = field(default=False, metadata={"help": "Two short rollouts: does it run?"})


def prompts(script: RecipeArguments, world: Path) -> tuple[Any, Any]:
    """(train, evaluation) prompts: a dataset by name, a local JSON file, or the reviews' (which have both)."""
    name = script.dataset_name
    try:
        if name and not name.endswith((".json", ".jsonl")):
            return load_dataset(name, script.dataset_config, split=script.dataset_train_split), None
        train = load_dataset("json", data_files=name or str(world / "prompts_train.jsonl"), split="train")
    except Exception as error:  # the library's own, of many kinds; the reason is in the last of the chain
        raise ValueError(f"--dataset_name {name}: {error.__cause__ or error or type(error).__name__}") from error
    return train, None if name else load_dataset("json", data_files=str(world / "prompts_test.jsonl"), split="train")


def reward(script: RecipeArguments, world: Path) -> Any:
    """The reward function: `module:function`, a reward model, or the reviews' sentiment model."""
    if script.reward is None:
        return RewardModel(str(world / "reward_model"), label="positive")
    if ":" not in script.reward or Path(script.reward).exists():
        return RewardModel(script.reward, label=script.reward_label)
    sys.path.insert(0, str(Path.cwd()))
    return pkgutil.resolve_name(script.reward)


class OneLine(ProgressCallback):
    """The Trainer's progress bar, with the numbers to watch instead of all fifty."""

    def on_log(self, args, state, control, logs: Any = None, **kwargs):
        if self.training_bar is not None and "kl/sequence/mean" in logs:
            score, kl, coef = (logs[name] for name in ("reward/score/mean", "kl/sequence/mean", "kl/coef"))
            line = f"step {state.global_step:4}: score {score:.2f}, KL {kl:5.2f} nats, coef {coef:.3f}"
            self.training_bar.write(line)


def kl_table(history: list[dict], rows: int = 14) -> Table:
    table = Table(title="score, and KL to the reference in nats per sequence")
    for name in ("step", "score", "reverse KL", "forward KL", "k1", "k3", "coef", "tokens"):
        table.add_column(name, justify="right")
    logs = [log for log in history if "kl/sequence/mean" in log]
    for log in [log for i, log in enumerate(logs) if (len(logs) - 1 - i) % (len(logs) // rows + 1) == 0]:
        length = log["completions/mean_length"]
        kls = [log[f"kl/{name}/mean"] * length for name in ("reverse", "forward", "k1", "k3")]
        numbers = [log["reward/score/mean"], *kls, log["kl/coef"]]
        table.add_row(str(log["step"]), *(f"{number:.3f}" for number in numbers), f"{length:.1f}")
    return table


def what_they_say(trainer: Any, reference: str, prompts: list[str]) -> Table:
    table = Table(title="the same prompts, continued by both, with their scores", show_lines=True)
    for name in ("prompt", "the reference", "score", "the policy", "score"):
        table.add_column(name)
    says = []
    for model in (reference, trainer.accelerator.unwrap_model(trainer.model)):
        write: Any = pipeline("text-generation", model, tokenizer=trainer.processing_class)
        made = write(prompts, max_new_tokens=32, do_sample=True, top_k=0, return_full_text=False)
        texts = [out[0]["generated_text"] for out in made]
        scores = trainer.reward_funcs[0](prompts=prompts, completions=texts, completion_ids=None)
        says.append([(Text(text.strip()), f"{score:.2f}") for text, score in zip(texts, scores, strict=True)])
    for prompt, old, new in zip(prompts, *says, strict=True):
        table.add_row(Text(prompt), *old, *new)
    return table


def prepare(script: RecipeArguments, args: PPOConfig, model_args: ModelConfig) -> PPOTrainer:
    """Everything that can be wrong with the arguments goes wrong here, before anything is trained."""
    if script.processes not in (None, args.world_size):
        way_out = "Launch as the first line of this recipe shows, or say --processes with the number you want."
        raise ValueError(f"asked for {script.processes} process(es), got {args.world_size}. {way_out}")
    args.max_steps = 2 * args.steps_per_rollout if script.smoke else args.max_steps
    checkpoint_to_resume(Path(args.output_dir or "."), args.resume_from_checkpoint)  # an error now rather than later
    world = Path() if model_args.model_name_or_path and script.dataset_name and script.reward else ensure_world()
    name = model_args.model_name_or_path or str(world / "reference")
    trust = {"revision": model_args.model_revision, "trust_remote_code": script.trust_remote_code}
    given = {"dtype": model_args.dtype or "auto", "attn_implementation": model_args.attn_implementation}
    train, evaluation = prompts(script, world)
    return PPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(name, use_safetensors=True, **trust, **given),
        reward_funcs=reward(script, world),
        args=args,
        train_dataset=train,
        eval_dataset=evaluation,
        processing_class=AutoTokenizer.from_pretrained(name, **trust),
        peft_config=get_peft_config(model_args),
    )


def main(trainer: Any) -> None:
    args, evaluation, name = trainer.args, trainer.eval_dataset, trainer.model.config._name_or_path
    console = Console(quiet=not trainer.is_world_process_zero(), markup=False, soft_wrap=True)
    console.print(f"{args.world_size} processes, {args.episodes_per_rollout} completions per rollout, policy {name}")
    trainer.remove_callback(ProgressCallback)
    trainer.add_callback(OneLine)
    before = trainer.evaluate() if evaluation else {}
    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    after = trainer.evaluate() if evaluation else {}
    trainer.save_model(args.output_dir)
    console.print(kl_table(trainer.state.log_history))
    if evaluation and trainer.is_world_process_zero():
        (score, kl), n = ("eval_reward/score/mean", "eval_kl/sequence/mean"), len(evaluation)
        console.print(what_they_say(trainer, name, list(evaluation["prompt"][:3])))
        console.print(f"On {n} held-out prompts the mean score went from {before[score]:.2f} to {after[score]:.2f},")
        console.print(f"at an exact reverse KL of {after[kl]:.1f} nats per sequence.")
    console.print(f"The policy: {args.output_dir}. What the penalty prevents: --kl_coef 0 --output_dir demo_out/free")
    if args.kl_log_tokens:
        console.print(f"Where in the text the two part, to look at: {Path(args.output_dir).resolve()}/kl/report.html")


if __name__ == "__main__":
    with one_line_errors():
        trainer = prepare(*parse_arguments((RecipeArguments, PPOConfig, ModelConfig)))
    main(trainer)
