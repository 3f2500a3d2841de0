"""PPO under a KL penalty: a small language model learns to write positive product reviews and stays near its reference.

    accelerate launch --config_file accelerate_config.yaml recipes/ppo_reviews.py --config recipes/ppo_reviews.yaml

Everything it needs is made on the spot and cached (recipes/reviews.py). With your own:

    --model_name_or_path any/causal-lm  --dataset_name any/dataset, or a file (.jsonl .csv .parquet: a
    `prompt` column; .txt: one prompt per line)
    --reward any/reward-model [--reward_label positive]  or  --reward module:function  --use_peft
Prints the KL table by step, and what both models say. Last time, on two CPU cores and two processes: see README.md.
"""

import dataclasses
import pkgutil
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from reviews import ensure_world
from rich.console import Console
from rich.table import Table
from rich.text import Text
from transformers import ProgressCallback, pipeline
from trl import ModelConfig, ScriptArguments, get_peft_config

from klft import PPOConfig, PPOTrainer
from klft.arguments import one_line_errors, parse_arguments
from klft.diagnostics.loading import read_prompts
from klft.exits import exit_codes
from klft.loading import load_model, load_tokenizer
from klft.ppo import RewardModel, check_output_dir, finished_run
from klft.writing import visible

TABLE_ROWS = 14
NO_USE = {
    "load_in_8bit", "load_in_4bit", "bnb_4bit_quant_type", "use_bnb_nested_quant", "bnb_4bit_quant_storage",
    "dataset_test_split", "dataset_streaming", "ignore_bias_buffers",
}  # fmt: skip


@dataclass
class RecipeArguments(ScriptArguments):
    """Data, reward and launch; PPOConfig and trl's ModelConfig hold the rest."""

    reward: str | None = field(default=None, metadata={"help": "Reward model (id or path), or module:function."})
    reward_label: str | None = field(default=None, metadata={"help": "Label whose probability is the reward."})
    processes: int | None = field(default=None, metadata={"help": "Stop unless this many processes run."})
    trust_remote_code: bool = field(default=False, metadata={"help": "Run code that a model's repository brings."})
    smoke: bool = field(default=False, metadata={"help": "Two short rollouts: does it run?"})


def check_used(*configs: Any) -> None:
    """Raise ValueError for an option of TRL's classes that this recipe has no use for."""
    for config in configs:
        for option in dataclasses.fields(config):
            if option.name in NO_USE and getattr(config, option.name) != option.default:
                raise ValueError(f"--{option.name} does nothing in this recipe: leave it out")


def load_reward(script: RecipeArguments, world: Path) -> Any:
    """The reward function: `module:function`, a reward model, or the reviews' sentiment model."""
    if script.reward is None:
        return RewardModel(str(world / "reward_model"), label="positive")
    if ":" not in script.reward or Path(script.reward).exists():  # a path may have a colon in it too
        return RewardModel(script.reward, label=script.reward_label)
    sys.path.insert(0, str(Path.cwd()))  # so that my_module.py may lie where the recipe is launched
    try:
        return pkgutil.resolve_name(script.reward)
    except SyntaxError as error:
        raise ImportError(f"--reward {script.reward}: {error.filename}:{error.lineno}: {error.msg}") from error
    except SystemExit as error:
        reason = "keep what it does as a script under `if __name__ == '__main__':`"
        raise ImportError(f"--reward {script.reward}: its module exits (code {error.code}): {reason}") from error


def prepare(script: RecipeArguments, args: PPOConfig, model_args: ModelConfig) -> PPOTrainer:
    """Load everything into a trainer. What can be wrong with the arguments goes wrong here, before any training."""
    if script.processes not in (None, args.world_size):
        way_out = "Launch as the first line of this recipe shows, or say --processes with the number you want."
        raise ValueError(f"asked for {script.processes} process(es), got {args.world_size}. {way_out}")
    check_used(script, model_args)
    if script.smoke:
        args.max_steps = 2 * args.steps_per_rollout
    # The trainer looks at output_dir only when it trains; an error is worth more before the models are loaded.
    check_output_dir(args)
    if done := finished_run(args):
        if args.process_index == 0:
            print(done)
        sys.exit(0)

    # So are prompts that cannot be read: a file (.txt, .csv, .jsonl, .parquet ...) or a dataset by name.
    train_prompts, evaluation_prompts = None, None
    if script.dataset_name:
        split, config = script.dataset_train_split, script.dataset_config
        train_prompts = read_prompts(script.dataset_name, split=split, config=config)

    # The reviews' world is built (once) unless model, prompts and reward all come from elsewhere.
    all_given = model_args.model_name_or_path and script.dataset_name and script.reward
    world = Path() if all_given else ensure_world()
    name = model_args.model_name_or_path or str(world / "reference")
    source = {"revision": model_args.model_revision, "trust_remote_code": script.trust_remote_code}

    if train_prompts is None:  # the reviews have both
        train_prompts = read_prompts(str(world / "prompts_train.jsonl"))
        evaluation_prompts = read_prompts(str(world / "prompts_test.jsonl"))
    # There is no reference among the arguments: PPOTrainer keeps a frozen copy of the model, or with --use_peft
    # switches the adapter off.
    return PPOTrainer(
        model=load_model(
            name,
            is_trainable=True,  # of an adapter that is trained on
            dtype=model_args.dtype or "auto",
            attn_implementation=model_args.attn_implementation,
            **source,
        ),
        reward_funcs=load_reward(script, world),
        args=args,
        train_dataset=train_prompts,
        eval_dataset=evaluation_prompts,
        processing_class=load_tokenizer(name, **source),
        peft_config=get_peft_config(model_args),
    )


class ProgressLine(ProgressCallback):
    """The Trainer's progress bar, with the numbers to watch instead of all fifty."""

    def on_log(self, args, state, control, logs: Any = None, **kwargs):
        """Write score, KL and coefficient of a rollout above the bar."""
        if self.training_bar is not None and "kl/sequence/reverse/mean" in logs:
            score, kl, coef = logs["reward/score/mean"], logs["kl/sequence/reverse/mean"], logs["kl/coef"]
            self.training_bar.write(
                f"step {state.global_step:4}: score {score:.2f}, KL {kl:5.2f} nats, coef {coef:.3f}"
            )


def kl_table(history: list[dict]) -> Table:
    """Score, KL and its estimators by step, at most TABLE_ROWS rows; the last one is always among them."""
    table = Table(title="score, and KL to the reference in nats per sequence")
    for name in ("step", "score", "reverse KL", "forward KL", "k1", "k3", "coef", "tokens"):
        table.add_column(name, justify="right")

    logs = [log for log in history if "kl/sequence/reverse/mean" in log]
    stride = len(logs) // TABLE_ROWS + 1
    for log in reversed(logs[::-1][::stride]):  # every stride-th log, counted from the last
        # The logs have nats per token; times tokens per completion they are nats per sequence.
        length = log["completions/mean_length"]
        kls = [log[f"kl/{name}/mean"] * length for name in ("reverse", "forward", "k1", "k3")]
        numbers = [log["reward/score/mean"], *kls, log["kl/coef"]]
        table.add_row(str(log["step"]), *[f"{number:.3f}" for number in numbers], f"{length:.1f}")
    return table


def samples_table(trainer: Any, reference: str, prompts: list[str]) -> Table:
    """The same prompts continued by the reference and by the policy, sampled, with their scores."""
    policy = trainer.accelerator.unwrap_model(trainer.model)
    cells_by_model = []
    for model in (load_model(reference), policy):
        generator: Any = pipeline("text-generation", model, tokenizer=trainer.processing_class, trust_remote_code=False)
        outputs = generator(prompts, max_new_tokens=32, do_sample=True, top_k=0, return_full_text=False)
        texts = [output[0]["generated_text"] for output in outputs]
        scores = trainer.reward_funcs[0](prompts=prompts, completions=texts, completion_ids=None)
        # A policy may write what a terminal would obey.
        shown = [Text(visible(text.strip())) for text in texts]
        cells_by_model.append([(text, f"{score:.2f}") for text, score in zip(shown, scores, strict=True)])

    table = Table(title="the same prompts, continued by both, with their scores", show_lines=True)
    for name in ("prompt", "the reference", "score", "the policy", "score"):
        table.add_column(name)
    for prompt, reference_cells, policy_cells in zip(prompts, *cells_by_model, strict=True):
        table.add_row(Text(visible(prompt)), *reference_cells, *policy_cells)
    return table


def main(trainer: Any) -> None:
    """Train, with an evaluation before and after where there are prompts for it, and print what came of it."""
    args, evaluation_prompts = trainer.args, trainer.eval_dataset
    name = trainer.model.config._name_or_path
    console = Console(quiet=not trainer.is_world_process_zero(), markup=False, soft_wrap=True)
    console.print(f"{args.world_size} processes, {args.episodes_per_rollout} completions per rollout, policy {name}")
    trainer.remove_callback(ProgressCallback)
    trainer.add_callback(ProgressLine)

    # All processes evaluate, train and save together; only the first one prints.
    before = trainer.evaluate() if evaluation_prompts else {}
    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    after = trainer.evaluate() if evaluation_prompts else {}
    trainer.save_model(args.output_dir)

    console.print(kl_table(trainer.state.log_history))
    if evaluation_prompts and trainer.is_world_process_zero():
        console.print(samples_table(trainer, reference=name, prompts=list(evaluation_prompts["prompt"][:3])))
        count, score, kl = len(evaluation_prompts), "eval_reward/score/mean", "eval_kl/sequence/reverse/mean"
        console.print(
            f"On {count} held-out prompts the mean score went from {before[score]:.2f} to {after[score]:.2f},"
        )
        console.print(f"at an exact reverse KL of {after[kl]:.1f} nats per sequence.")
    console.print(f"The policy: {args.output_dir}. What the penalty prevents: --kl_coef 0 --output_dir demo_out/free")
    if args.kl_log_tokens:
        page = Path(args.output_dir).resolve() / "kl" / "report.html"
        console.print(f"Where in the text the two part, to look at: {page}")


if __name__ == "__main__":
    with exit_codes():
        with one_line_errors():
            script, args, model_args = parse_arguments((RecipeArguments, PPOConfig, ModelConfig))
            trainer = prepare(script, args=args, model_args=model_args)
        main(trainer)
