"""PPO under a KL penalty with your model, your prompts and your reward.

    accelerate launch --config_file accelerate_config.yaml recipes/ppo.py --config recipes/ppo.yaml \\
        --model_name_or_path any/causal-lm --prompts prompts.jsonl --reward my_reward.py:score
    python recipes/ppo.py --config recipes/ppo.yaml --smoke      # made-up ones: does it run?

Prompts: a file (.txt: one per line; .jsonl, .json, .csv, .parquet: a column `prompt`, or --prompt_column), or a
dataset's name. Rewards, one or several: `module:function` or `file.py:function` (TRL's signature: prompts, completions
and the other columns -> one number, or None, per completion), or a sequence-classification model. The reference is the
model as it was: a frozen copy, or with --use_peft the model without the adapter. A share of the prompts is held out;
score and KL are measured on them before and after. output_dir gets the policy, README.md (its card), run.yaml (to run
it again), log.jsonl (a line per log) and samples.jsonl (the held-out prompts continued by both, with their scores).
"""

import json
import random
import sys
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ppo_options import (
    QUANTISATION,
    check_files,
    check_names,
    check_required,
    check_trackers,
    check_used,
    check_values,
    given_options,
    options_in_errors,
    parse_light,
    wants_help,
)
from reward_functions import is_function, load_function

from klft.arguments import SAME, named_options, one_line_errors, parse_arguments
from klft.exits import exit_codes

if TYPE_CHECKING:
    from datasets import Dataset
    from trl import ModelConfig

    from klft import PPOConfig, PPOTrainer

# What this recipe does not choose for anyone.
REQUIRED = {
    "model_name_or_path": "a causal LM: a folder or a hub id",
    "prompts": "a .jsonl, .csv, .parquet or .txt file, or a dataset's name",
    "reward": "module:function, file.py:function or a reward model",
}
LENGTHS = next(group for group in SAME if "max_steps" in group)  # options that say how long a run is
UNUSED = {*QUANTISATION, "model_init_kwargs"}
FEWEST, MOST = 8, 256  # prompts held out


@dataclass
class OwnArguments:
    """Prompts, reward and launch."""

    prompts: str | None = field(
        default=None, metadata={"help": "A .jsonl, .json, .csv, .parquet or .txt file, or a dataset's name."}
    )
    prompt_column: str = field(default="prompt", metadata={"help": "Column of the prompts: texts or messages."})
    prompts_split: str | None = field(default=None, metadata={"help": "Of a dataset by name; default train."})
    prompts_subset: str | None = field(default=None, metadata={"help": "Of a dataset by name: its configuration."})
    held_out: float = field(
        default=0.1, metadata={"help": "Share of the prompts kept for evaluation, at least 8, at most 256; 0: none."}
    )
    reward: list[str] | None = field(
        default=None, metadata={"help": "One or several: module:function, file.py:function, or a reward model."}
    )
    reward_label: list[str] | None = field(
        default=None,
        metadata={"help": "For each reward model, in order: label whose probability is the reward; none: raw output."},
    )
    processes: int | None = field(default=None, metadata={"help": "Stop unless this many processes run."})
    trust_remote_code: bool = field(default=False, metadata={"help": "Run code that the model's repository brings."})
    smoke: bool = field(
        default=False, metadata={"help": "Two short rollouts, with a made-up model, prompts or reward if not given."}
    )


# --- prompts, rewards, models ----------------------------------------------------------------------------------------


def check_own(own: OwnArguments, model_args: "ModelConfig") -> None:
    """Raise ValueError for what cannot work, or would do nothing."""
    check_used(UNUSED, model_args)
    if not model_args.use_peft:
        adapters = {name for name in vars(model_args) if name.startswith("lora_")} | {"use_rslora", "use_dora"}
        check_used(adapters, model_args, why="does nothing without --use_peft")
    if not 0 <= own.held_out < 1:
        raise ValueError(f"--held_out must be a share of the prompts, at least 0 and below 1, got {own.held_out}")
    for name in ("prompts_split", "prompts_subset"):
        if getattr(own, name) and Path(own.prompts or "").is_file():
            raise ValueError(f"--{name} does nothing with --prompts {own.prompts}, a file: leave it out")
    rewards = own.reward or []
    models = [reward for reward in rewards if not is_function(reward)]
    labels = own.reward_label
    if labels is not None and len(labels) != len(models):
        raise ValueError(f"--reward_label has {len(labels)} label(s), and --reward {len(models)} model(s): {models}")


def check_own_with(args: "PPOConfig", own: OwnArguments) -> None:
    """Raise ValueError for what does not go with the arguments of PPO."""
    from ppo_run import check_processes

    check_processes(own.processes, args.world_size)
    check_used(UNUSED, args)
    weights, rewards = args.reward_weights, own.reward or []
    if weights is not None and len(weights) != len(rewards):
        raise ValueError(f"--reward_weights has {len(weights)} weight(s), and --reward names {len(rewards)}: {rewards}")


def make_smoke(own: OwnArguments, model_args: "ModelConfig", args: "PPOConfig", folder: Path) -> None:
    """Fill in what is not given: a tiny model that was never trained, prompts of its words, and a reward for one."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    words = ["<pad>", "<eos>", *(f"word{number}" for number in range(30))]
    if args.should_save:  # one process of each machine
        folder.mkdir(parents=True, exist_ok=True)
        inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<pad>"))
        inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # pyright: ignore[reportAttributeAccessIssue]
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", eos_token="<eos>")
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=len(words),
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            max_position_embeddings=512,
            initializer_range=0.2,
            pad_token_id=0,
            eos_token_id=1,
            bos_token_id=None,
        )
        LlamaForCausalLM(config).save_pretrained(folder / "model")
        tokenizer.save_pretrained(folder / "model")
        lines = [
            f"{words[2 + i % 30]} {words[2 + i // 30 % 30]}" for i in range(2 * args.episodes_per_rollout + FEWEST)
        ]
        (folder / "prompts.txt").write_text("\n".join(lines))
        (folder / "reward.py").write_text(
            '"""How often word7 is said."""\n\n\n'
            'def score(completions, **_):\n    return [text.split().count("word7") for text in completions]\n'
        )
    model_args.model_name_or_path = model_args.model_name_or_path or str(folder / "model")
    own.prompts = own.prompts or str(folder / "prompts.txt")
    own.reward = own.reward or [f"{folder / 'reward.py'}:score"]


def read_own_prompts(own: OwnArguments, args: "PPOConfig") -> tuple["Dataset", "Dataset | None"]:
    """(prompts to train on, prompts held out), no prompt in both."""
    from klft.diagnostics.loading import read_prompts
    from klft.ppo.inputs import check_dataset, check_rollout_size

    name, column = str(own.prompts), own.prompt_column
    where = f"--prompts {name}" + (f" --prompt_column {column}" if column != "prompt" else "")
    try:
        rows = read_prompts(name, split=own.prompts_split or "train", config=own.prompts_subset, column=column)
    except ValueError as error:
        way_out = ": name it with --prompt_column" if "has no column 'prompt'" in str(error) else ""
        raise ValueError(f"{where}: {error}{way_out}") from error
    rows = check_dataset(rows, where)
    if len(rows) < args.episodes_per_rollout:  # what a pass leaves over is said of those that are trained on
        check_rollout_size(len(rows), args)

    # Whole prompts are held out, however often they stand there; one rollout's worth stays.
    keys = [json.dumps(prompt, sort_keys=True, default=str) for prompt in rows["prompt"][:]]
    counts = Counter(keys)
    order = list(dict.fromkeys(keys[i] for i in random.Random(args.seed).sample(range(len(keys)), len(keys))))
    wanted = min(max(round(own.held_out * len(rows)), FEWEST), MOST) if own.held_out else 0
    kept_out: set[str] = set()
    left = len(rows)
    for key in order if wanted else ():
        if len(kept_out) < wanted and left - counts[key] >= args.episodes_per_rollout:
            kept_out.add(key)
            left -= counts[key]
    held = [keys.index(key) for key in order if key in kept_out]
    train = rows.select([i for i, key in enumerate(keys) if key not in kept_out])
    return train, rows.select(held) if held else None


def load_judge(name: str, label: str | None) -> Any:
    """A reward model. label: a name, an index, or none."""
    from klft.ppo import RewardModel

    by_number = label is not None and label.isdigit()
    return RewardModel(name, label=int(str(label)) if by_number else None if label == "none" else label)


def load_rewards(own: OwnArguments, args: "PPOConfig", rows: "Dataset") -> list[Any]:
    """The reward functions and models, each called on two made-up completions of the first prompts."""
    from ppo_run import call_rewards
    from transformers import TrainerState

    labels = iter(own.reward_label or [])
    some = [rows[i % len(rows)] for i in range(2)]
    texts = ["yes", "a longer one"]
    written = [
        text if isinstance(row["prompt"], str) else [{"role": "assistant", "content": text}]
        for row, text in zip(some, texts, strict=True)
    ]
    functions = []
    rewards: Any = own.reward
    for reward in sorted(rewards, key=is_function, reverse=True):  # models take longer
        doing = "loading it"
        try:
            function: Any = load_function(reward) if is_function(reward) else load_judge(reward, next(labels, None))
            doing = "called on two made-up completions"
            call_rewards([function], some, written, [[0], [0, 0]], args, TrainerState())
        except Exception as error:  # whatever a function raises
            raise ValueError(f"--reward {reward}, {doing}: {type(error).__name__}: {error}") from error
        functions.append((rewards.index(reward), function))
    return [function for _, function in sorted(functions, key=lambda pair: pair[0])]


def prepare(own: OwnArguments, args: "PPOConfig", model_args: "ModelConfig") -> "PPOTrainer":
    """Everything in a trainer, the cheap things first: what is wrong is said before a large model is loaded."""
    from ppo_files import CardPPOTrainer
    from ppo_run import adapter_config, no_bars_of_libraries, say_loading

    from klft.loading import load_model, load_tokenizer
    from klft.ppo import check_output_dir, finished_run

    no_bars_of_libraries()
    check_own_with(args, own)
    check_output_dir(args)
    if own.smoke:
        if named_options(sys.argv[1:]).isdisjoint(LENGTHS):
            args.max_steps, args.total_episodes = 2 * args.steps_per_rollout, None
        args.max_completion_length = min(args.max_completion_length, 16)
        with args.main_process_first(desc="the smoke's model, prompts and reward"):
            make_smoke(own, model_args, args, Path(str(args.output_dir)) / "smoke")
    if done := finished_run(args):
        if args.process_index == 0:
            print(done)
        sys.exit(0)
    train_prompts, held_out = read_own_prompts(own, args)
    name = str(model_args.model_name_or_path)
    source = {"revision": model_args.model_revision, "trust_remote_code": own.trust_remote_code}
    tokenizer = load_tokenizer(name, "--model_name_or_path", **source)  # small, and it says when there is no such model
    rewards = load_rewards(own, args, train_prompts)
    say_loading(name, args)
    policy = load_model(
        name,
        "--model_name_or_path",
        is_trainable=True,  # of an adapter that is trained on
        dtype=model_args.dtype or "auto",
        attn_implementation=model_args.attn_implementation,
        **source,
    )
    return CardPPOTrainer(
        model=policy,
        reward_funcs=rewards,
        args=args,
        train_dataset=train_prompts,
        eval_dataset=held_out,
        processing_class=tokenizer,
        peft_config=adapter_config(model_args, policy),
    )


# --- the run ---------------------------------------------------------------------------------------------------------


def describe(trainer: "PPOTrainer", own: OwnArguments, model_args: "ModelConfig") -> dict[str, str]:
    """Policy, prompts, rewards, KL and reference of the run, in words."""
    from klft import AdapterReference

    args, penalty, name = trainer.args, trainer.penalty, str(model_args.model_name_or_path)
    weights: Any = args.reward_weights or [1.0] * len(own.reward or [])
    rewards = [f"{w:g} x {r}" if w != 1 else r for w, r in zip(weights, own.reward or [], strict=True)]
    where = {"both": "reward and loss"}.get(penalty.placement, penalty.placement)
    kind = "" if args.kl_direction == "reverse" else f" {args.kl_direction}"
    control = "" if args.kl_controller == "fixed" else f", {args.kl_controller}"
    aim = f" to {args.kl_target:g} nats" if args.kl_target else ""
    as_it_was = f"a frozen copy of {name}"
    without = f"{name} without {'its' if not model_args.use_peft else 'the new'} adapter"
    held_out: Any = trainer.eval_dataset
    train_prompts: Any = trainer.train_dataset
    return {
        "policy": name + (", a new adapter" if model_args.use_peft else ""),
        "prompts": f"{len(train_prompts) + len(held_out or [])} from {own.prompts}",
        "held out": f"{len(held_out or [])}",
        "reward": ", ".join(rewards),
        "KL": f"{args.kl_estimator}{kind} in the {where}, coef {args.kl_coef:g}{control}{aim}",
        "reference": without if isinstance(penalty.reference, AdapterReference) else as_it_was,
    }


def main(trainer: Any, own: OwnArguments, model_args: "ModelConfig") -> None:
    """Train, write what belongs beside the policy, and print what came of it and what to do next."""
    from ppo_files import LogLines, card, next_command, samples_wanted, settings, write_samples, write_settings
    from ppo_run import console_of, continued_by_both, print_results, train

    args, console, folder = trainer.args, console_of(trainer), Path(trainer.args.output_dir)
    said = describe(trainer, own, model_args)
    console.print(
        f"policy {said['policy']}, prompts {said['prompts']} ({said['held out']} held out), reward {said['reward']}, "
        f"KL: {said['KL']}, reference {said['reference']}; {args.world_size} process(es), "
        f"{args.episodes_per_rollout} completions per rollout"
    )
    found = settings(given_options(), own, args, model_args)
    if trainer.is_world_process_zero():
        write_settings(folder / "run.yaml", found)
    trainer.add_callback(LogLines(folder / "log.jsonl"))
    command = next_command(trainer, str(model_args.model_name_or_path), own.trust_remote_code)

    before, after = train(trainer, lambda *measured: card(said, found, measured, trainer.state.log_history, command))
    samples = continued_by_both(trainer, samples_wanted(trainer))
    if trainer.is_world_process_zero():
        write_samples(samples, folder / "samples.jsonl")
    print_results(trainer, console, before, after, samples)
    console.print(
        f"In {folder}: the policy, README.md, run.yaml, log.jsonl, and samples.jsonl ({len(samples)} prompts continued "
        "by both, with their scores)."
    )
    console.print(f"Where in them the policy and its reference part: {command}")


if __name__ == "__main__":
    with exit_codes():
        with one_line_errors(), options_in_errors():
            from trl import ModelConfig

            # In seconds; what it takes to import torch, transformers and TRL is paid by those who can train.
            check_names(OwnArguments, ModelConfig)
            if not wants_help():
                check_required(REQUIRED)
                check_files()
                check_own(*parse_light(OwnArguments, ModelConfig))
                check_trackers()
                check_values(OwnArguments, ModelConfig)
            from klft import PPOConfig

            own, args, model_args = parse_arguments((OwnArguments, PPOConfig, ModelConfig), unused=UNUSED)
            trainer = prepare(own, args, model_args)
        main(trainer, own, model_args)
