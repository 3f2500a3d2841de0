"""PPO under a KL penalty: a small language model learns to write positive product reviews and stays near its reference.

    accelerate launch --config_file accelerate_config.yaml recipes/ppo_reviews.py --config recipes/ppo_reviews.yaml

Everything it needs is made on the spot and cached (recipes/reviews.py). Your own model, prompts and reward:
recipes/ppo.py. Prints the KL table by step, and what both models say. Last time, on two CPU cores and two processes:
see README.md.
"""

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ppo_options import (
    QUANTISATION,
    check_names,
    check_trackers,
    check_used,
    check_values,
    options_in_errors,
    parse_light,
    wants_help,
)
from reward_functions import is_function, load_function
from trl import ModelConfig, ScriptArguments

from klft.arguments import one_line_errors, parse_arguments
from klft.exits import exit_codes

if TYPE_CHECKING:
    from klft import PPOConfig, PPOTrainer

NO_USE = QUANTISATION | {"dataset_test_split", "dataset_streaming", "ignore_bias_buffers", "model_init_kwargs"}


@dataclass
class RecipeArguments(ScriptArguments):
    """Data, reward and launch."""

    reward: str | None = field(default=None, metadata={"help": "Reward model (id or path), or module:function."})
    reward_label: str | None = field(default=None, metadata={"help": "Label whose probability is the reward."})
    processes: int | None = field(default=None, metadata={"help": "Stop unless this many processes run."})
    trust_remote_code: bool = field(default=False, metadata={"help": "Run code that a model's repository brings."})
    smoke: bool = field(default=False, metadata={"help": "Two short rollouts: does it run?"})


def load_reward(script: RecipeArguments, world: Path) -> Any:
    """The reward function: `module:function`, a reward model, or the reviews' sentiment model."""
    from klft.ppo import RewardModel

    if script.reward is None:
        return RewardModel(str(world / "reward_model"), label="positive")
    if is_function(script.reward):
        return load_function(script.reward)
    return RewardModel(script.reward, label=script.reward_label)


def check_own(script: RecipeArguments, model_args: ModelConfig) -> None:
    """Raise ValueError for what would do nothing, or not what was meant."""
    check_used(NO_USE, script, model_args)
    if model_args.model_name_or_path and not (script.dataset_name and script.reward):
        raise ValueError(
            f"this is the demo: {model_args.model_name_or_path} would be trained on its prompts, or by its reward. "
            "Your own model, prompts and reward: recipes/ppo.py"
        )


def prepare(script: RecipeArguments, args: "PPOConfig", model_args: ModelConfig) -> "PPOTrainer":
    """Load everything into a trainer. What can be wrong with the arguments goes wrong here, before any training."""
    from ppo_run import adapter_config, check_processes, no_bars_of_libraries, say_loading
    from reviews import ensure_world

    from klft import PPOTrainer
    from klft.diagnostics.loading import read_prompts
    from klft.loading import load_model, load_tokenizer
    from klft.ppo import check_output_dir, finished_run

    no_bars_of_libraries()
    check_processes(script.processes, args.world_size)
    check_used(NO_USE, args)
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
    say_loading(name, args)
    policy = load_model(
        name,
        is_trainable=True,  # of an adapter that is trained on
        dtype=model_args.dtype or "auto",
        attn_implementation=model_args.attn_implementation,
        **source,
    )
    return PPOTrainer(
        model=policy,
        reward_funcs=load_reward(script, world),
        args=args,
        train_dataset=train_prompts,
        eval_dataset=evaluation_prompts,
        processing_class=load_tokenizer(name, **source),
        peft_config=adapter_config(model_args, policy),
    )


def main(trainer: Any) -> None:
    """Train, with an evaluation before and after where there are prompts for it, and print what came of it."""
    from ppo_run import EXAMPLES, console_of, continued_by_both, print_results, train

    args, console = trainer.args, console_of(trainer)
    name = trainer.model.config._name_or_path
    console.print(f"{args.world_size} processes, {args.episodes_per_rollout} completions per rollout, policy {name}")

    before, after = train(trainer)
    print_results(trainer, console, before, after, continued_by_both(trainer, EXAMPLES) if before else [])
    console.print(f"The policy: {args.output_dir}. What the penalty prevents: --kl_coef 0 --output_dir demo_out/free")
    if args.kl_log_tokens:
        page = Path(args.output_dir).resolve() / "kl" / "report.html"
        console.print(f"Where in the text the two part, to look at: {page}")


if __name__ == "__main__":
    with exit_codes():
        with one_line_errors(), options_in_errors():
            check_names(RecipeArguments, ModelConfig)
            if not wants_help():
                check_own(*parse_light(RecipeArguments, ModelConfig))
                check_trackers()
                check_values(RecipeArguments, ModelConfig)
            from klft import PPOConfig

            script, args, model_args = parse_arguments((RecipeArguments, PPOConfig, ModelConfig), unused=NO_USE)
            trainer = prepare(script, args=args, model_args=model_args)
        main(trainer)
