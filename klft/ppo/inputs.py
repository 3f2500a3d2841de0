"""PPOTrainer's arguments, checked and made into what it trains with: models, tokenizer, datasets, prompt order."""

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from datasets import Dataset
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import Sampler
from transformers import PreTrainedTokenizerBase
from transformers.utils import logging

from klft.loading import check_saved_tokenizer, load_model, load_tokenizer
from klft.models import (
    base_of,
    check_causal,
    check_left_padding,
    check_no_shared_storage,
    check_vocabularies,
    max_positions,
    require_causal_lm,
    unwrap,
    vocab_size,
)
from klft.parallel import Placement
from klft.ppo import value as value_function
from klft.ppo.adapters import attach_adapter, check_method
from klft.ppo.config import PPOConfig
from klft.ppo.rewards import RewardModel
from klft.prompts import TEMPLATE_COLUMNS, encode_prompt, template_arguments
from klft.references import AdapterReference, FrozenReference, Reference, resolve_reference, why_base_moves

logger = logging.get_logger(__name__)


def resolve_args(args: Any) -> PPOConfig:
    """The arguments given, or the defaults. Raises TypeError for another trainer's."""
    args = args or PPOConfig(output_dir="ppo_output")
    if not isinstance(args, PPOConfig):
        raise TypeError(f"args must be a klft.PPOConfig, got {type(args).__name__}")
    return args


def load_policy(model: nn.Module | str, model_init_kwargs: dict[str, Any] | None = None) -> nn.Module:
    """A model id or path -> a causal LM; a model is checked and passed through.

    In float32 unless `model_init_kwargs` say otherwise: in 16 bit most steps of a small learning rate round to nothing.
    """
    if isinstance(model, str):
        options: Any = {"dtype": torch.float32} | (model_init_kwargs or {})
        return load_model(model, is_trainable=True, **options)
    if model_init_kwargs:
        raise ValueError("model_init_kwargs are for a model that is given by name; this one is loaded already")
    inside = unwrap(model)
    if inside is not model:  # a checkpoint of the wrapper would have names that from_pretrained does not know
        logger.warning(
            f"model: took the {type(inside).__name__} out of its {type(model).__name__}; the Trainer wraps it itself "
            "(to compile it say torch_compile=True)"
        )
    require_causal_lm(inside, "model")
    return inside


def trainable_policy_weights(policy: nn.Module) -> dict[str, nn.Parameter]:
    """The weights that are trained, without the value function's, by name."""
    return {
        name: p
        for name, p in policy.named_parameters()
        if p.requires_grad and not value_function.is_value_parameter(name)
    }


def check_gradient(policy: nn.Module) -> None:
    """Raise RuntimeError where no trainable weight has a gradient after a backward."""
    trained = trainable_policy_weights(policy)
    if all(p.grad is None for p in trained.values()):
        raise RuntimeError(
            f"no gradient reaches the policy: of its {len(trained)} trainable tensors ({next(iter(trained))}, ...) "
            "none has one after the first backward. Does its forward run under no_grad, or through a frozen copy?"
        )


def check_policy_can_move(
    policy: nn.Module, optimizers: tuple[Optimizer | None, LRScheduler | None], adapter_is_new: bool
) -> None:
    """Raise ValueError for a policy without a trainable weight, or with none in the optimizer; warn of 16 bits."""
    trainable = trainable_policy_weights(policy)
    if not trainable:
        hint = (
            "load the adapter with PeftModel.from_pretrained(..., is_trainable=True)"
            if hasattr(policy, "peft_config")
            else "call model.requires_grad_(True), or give a peft_config"
        )
        raise ValueError(f"no weight of the policy is trainable, so it could not move: {hint}")
    half = [name for name, p in trainable.items() if p.dtype in (torch.bfloat16, torch.float16)]
    if half:
        logger.warning(
            f"{len(half)} of {len(trainable)} trainable tensors have 16 bits ({half[0]}, ...): a learning rate below "
            "about 1e-4 rounds most of their steps to nothing. Load the policy with dtype=torch.float32, and say "
            "bf16=True for the speed"
        )
    if optimizers[0] is not None:
        complete_optimizer(optimizers[0], optimizers[1], policy, adapter_is_new)


def check_first_ratio(log_ratio: torch.Tensor) -> None:
    """Raise RuntimeError unless the policy scores its tokens in the loss as it did in the rollout, before a step.

    Rounding in 16 bit moves single tokens; noise that is still on moves most of them.
    """
    off = float((log_ratio.detach().exp() - 1).abs().mean())
    if not off < 0.05:
        raise RuntimeError(
            f"the first ratio is not 1: before any step the policy's tokens have other probabilities in the loss than "
            f"in the rollout (by {off:.0%} on average), so they would be clipped for nothing. Something is random in "
            "its forward (a router's noise, a quantised base that depends on the batch): turn it off. "
            "disable_dropout=False trains with it all the same"
        )


def complete_optimizer(optimizer: Optimizer, scheduler: Any, policy: nn.Module, adapter_is_new: bool) -> None:
    """Give a user's optimizer the value function and adapter that klft added to the model after it was made.

    Raises ValueError where it holds no weight of the policy, and where a scheduler was made for its groups already.
    """
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    missing = {name: p for name, p in policy.named_parameters() if p.requires_grad and id(p) not in held}
    # With an adapter all that is trained was made here; without, the value function.
    values = {name: p for name, p in missing.items() if value_function.is_value_parameter(name)}
    added = missing if adapter_is_new else values
    if added and scheduler is not None:
        raise ValueError(
            f"optimizers: the optimizer lacks {len(added)} tensor(s) that klft added to the model "
            f"({next(iter(added))}), and its scheduler was made without them. Pass optimizers=(optimizer, None)."
        )
    if added:
        optimizer.add_param_group({"params": list(added.values())})
        logger.warning(f"the optimizer was given {len(added)} tensor(s) that klft added to the model, as a last group")
    held |= {id(p) for p in added.values()}
    if not any(id(p) in held for p in trainable_policy_weights(policy).values()):
        raise ValueError("optimizers: the optimizer holds no trainable weight of the policy, so it could not move")


def check_nothing_shared(
    policy: nn.Module, value_model: nn.Module | None, reference: Reference | None, judges: Mapping[str, nn.Module]
) -> None:
    """Raise ValueError where two of policy, value model, reference and reward models live in one storage."""
    if value_model is not None:
        check_no_shared_storage(value_model, policy, role="value model")
        if reference is not None:
            reference.check_independent(value_model)
    for name, judge in judges.items():
        check_no_shared_storage(judge, policy, role=f"reward model {name!r}")
        if value_model is not None:
            check_no_shared_storage(judge, value_model, role=f"reward model {name!r}", trained_role="value model")


def resolve_tokenizer(
    processing_class: Any, model: nn.Module, model_init_kwargs: dict[str, Any] | None = None
) -> PreTrainedTokenizerBase:
    """The tokenizer given (a processor has one), or the model's own. Raises TypeError for what is none.

    Without a pad token EOS pads: masks come from lengths, never from it.
    """
    given = getattr(processing_class, "tokenizer", processing_class)
    if given is None:
        options = {k: v for k, v in (model_init_kwargs or {}).items() if k in ("trust_remote_code", "revision")}
        tokenizer: Any = load_tokenizer(base_of(model).config._name_or_path, "processing_class", **options)
    else:
        tokenizer = given
    if not hasattr(tokenizer, "eos_token_id"):
        raise TypeError(
            f"processing_class: expected a tokenizer, or a processor that has one, got {type(tokenizer).__name__}. "
            "Of a name: AutoTokenizer.from_pretrained(name)"
        )
    if tokenizer.eos_token_id is None:
        raise ValueError("the tokenizer has no EOS token, so no completion could ever end; set tokenizer.eos_token")
    if tokenizer.pad_token_id is None:
        logger.info(f"the tokenizer has no pad token; padding with its EOS token {tokenizer.eos_token!r}")
    return tokenizer


def build_policy_and_reference(
    model: Any, reference: Any, value_model: Any, peft_config: Any, tokenizer: Any, judges: Mapping[str, nn.Module]
) -> tuple[nn.Module, Reference]:
    """(policy with its value function and adapter, checked reference). judges: the reward models, by name.

    The reference given (a model is frozen); by default the policy with its adapter off, or a frozen copy of it as it is
    now. Refuses one that would move with the policy, or speaks about another vocabulary, and a policy that sees what
    follows or reads padding: prompts are padded on the left.
    """
    unfit = "it is no single model" if hasattr(reference, "parts") else getattr(reference, "fixed_text", None)
    if unfit:
        raise TypeError(
            f"reference: a {type(reference).__name__} cannot score what the policy will sample ({unfit}): pass a "
            "model, an AdapterReference or an EMAReference"
        )
    check_causal(model)
    check_left_padding(model)
    check_method(model, peft_config)
    peft, another = peft_config is not None or hasattr(model, "peft_config"), reference is not None
    moves = None if peft_config is None else why_base_moves(peft_config)
    if reference is None and (moves or not peft):
        if moves:
            logger.warning(f"peft_config: {moves}, so the reference is a frozen copy of the model as it is now")
        reference = FrozenReference(copy.deepcopy(model))
    # Before the value function is attached: it is trained, and no part of the reference.
    resolved = None if reference is None and peft_config is not None else resolve_reference(reference, model)
    of_reference = vocab_size(model) if resolved is None else resolved.vocab_size
    check_vocabularies(tokenizer, policy=vocab_size(model), reference=of_reference)
    if another and resolved is not None:
        check_saved_tokenizer(tokenizer, resolved.name)
    check_nothing_shared(model, value_model, resolved, judges)
    policy = model
    if peft_config is not None:
        policy = attach_adapter(model, peft_config, is_reference=resolved is None)
    if resolved is None:
        resolved = AdapterReference(policy)
        resolved.check_independent(policy)
    attach_value_function(policy, value_model)
    return policy, resolved


def require_readable_head(reference: Reference) -> None:
    """Raise TypeError where a loss of exact KL, which is taken without logits, cannot be had from the reference."""
    one = torch.zeros(1, 1, dtype=torch.long)
    try:
        reference.hidden(one, torch.ones_like(one))
    except TypeError as error:
        raise TypeError(
            f"kl_estimator='exact' takes its loss without logits, and the reference's head cannot be read: {error}. "
            "kl_estimator='k1' needs no head of the reference"
        ) from error


def attach_value_function(policy: Any, value_model: Any) -> None:
    """Give the policy the value model, or a value head if it has none yet."""
    if value_model is not None:
        value_function.attach_value_model(policy, value_model)
    elif not hasattr(base_of(policy), "v_head"):
        value_function.attach_value_head(policy)
    value_function.install_hooks(policy)


def _why_no_prompt(prompt: Any) -> str | None:
    """Why this is neither text nor messages, to follow its number; None where it is, or is empty."""
    if not prompt or isinstance(prompt, str):
        return None
    wanted = "must be text, or messages with a role and a content"
    if not isinstance(prompt, list):
        return wanted
    if all(isinstance(token, int) for token in prompt):
        return f"{wanted}, not token ids: decode them (the trainer's tokenizer encodes prompts itself)"
    if all(isinstance(text, str) for text in prompt):
        return f"{wanted}, not a list of texts: give each a row of its own"
    if not all(isinstance(m, dict) and m.get("role") and "content" in m for m in prompt):
        return wanted
    if prompt[-1]["role"] not in ("user", "tool", "assistant"):
        return (
            f"ends with a message of {prompt[-1]['role']!r}: an assistant answers a user or tool, or continues its own"
        )
    return None


def prompt_rows(dataset: Dataset) -> Dataset:
    """The columns that make a prompt's tokens."""
    return dataset.select_columns([c for c in ("prompt", *TEMPLATE_COLUMNS) if c in dataset.column_names])


def _all_rows(dataset: Dataset) -> list[dict[str, Any]]:
    """All rows, read at once: one by one takes a hundred times as long."""
    columns: Any = dataset[:]
    return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]


def check_templates(dataset: Dataset, name: str, args: PPOConfig, tokenizer: Any, judges: Sequence[Any]) -> None:
    """Raise ValueError where a conversation could not be rendered, for the policy or for a reward model."""
    if set(TEMPLATE_COLUMNS) & set(dataset.column_names):
        for row in prompt_rows(dataset):
            template_arguments(row, args.chat_template_kwargs)  # pyright: ignore[reportArgumentType]
    if all(isinstance(prompt, str) for prompt in dataset["prompt"][:]):
        return
    if tokenizer.chat_template is None:
        raise ValueError(
            f"{name} has conversations, and the policy's tokenizer has no chat template: set tokenizer.chat_template, "
            "take a model that has one, or make the prompts texts"
        )
    for judge in judges:
        if isinstance(judge, RewardModel) and judge.tokenizer.chat_template is None:
            raise ValueError(
                f"{name} has conversations, and the tokenizer of reward model {judge.__name__!r} has no chat template: "
                "give RewardModel(..., tokenizer=...) one, or take a reward function of your own"
            )


def check_dataset(dataset: Any, name: str) -> Dataset:
    """Check for a `prompt` column; drop empty prompts and say how many.

    Raises TypeError for a streaming dataset, ValueError for a missing column or where no prompt is left.
    """
    if not isinstance(dataset, Dataset):
        raise TypeError(f"{name}: expected a datasets.Dataset with a length, got {type(dataset).__name__}")
    if "prompt" not in dataset.column_names:
        raise ValueError(f"{name} needs a column 'prompt' (text or messages); it has {dataset.column_names}")
    clash = {"prompts", "completions", "completion_ids"} & set(dataset.column_names)
    if clash:
        raise ValueError(f"{name}: rename the column(s) {sorted(clash)}; reward functions get the sampled ones")
    prompts = dataset["prompt"][:]  # at once, see _all_rows
    strange = next(((i, why) for i, p in enumerate(prompts) if (why := _why_no_prompt(p))), None)
    if strange is not None:
        raise ValueError(f"{name}: prompt {strange[0]} {strange[1]}, got {prompts[strange[0]]!r:.120}")
    filled = [i for i, p in enumerate(prompts) if p and not (isinstance(p, str) and p.isspace())]
    if len(filled) < len(dataset):
        logger.warning(f"{name}: dropped {len(dataset) - len(filled)} empty prompt(s) of {len(dataset)}")
        dataset = dataset.select(filled)
    if not len(dataset):
        raise ValueError(f"{name} has no prompt")
    return dataset


def check_rollout_size(prompts: int, args: PPOConfig) -> None:
    """Raise ValueError, with sizes that fit, where a rollout takes more prompts; say how many a pass leaves over."""
    names = ("per_device_train_batch_size", "gradient_accumulation_steps", "num_mini_batches")
    sizes = {name: getattr(args, name) for name in names} | {"processes": args.world_size}
    takes = args.episodes_per_rollout
    arithmetic = f"one rollout takes {takes} = " + " * ".join(f"{size} ({name})" for name, size in sizes.items())
    if prompts < takes:
        fit = [f"{name} = {prompts * size // takes}" for name, size in sizes.items() if prompts * size >= takes]
        raise ValueError(
            f"train_dataset has {prompts} prompt(s), and {arithmetic}. What would fit: "
            f"{', or '.join(fit) if fit else f'sizes whose product is at most {prompts}'}; or {takes} prompts"
        )
    unused = prompts % takes
    if unused and args.process_index == 0:
        which = "the last ones" if args.train_sampling_strategy == "sequential" else "others each time"
        logger.warning(
            f"train_dataset: a pass leaves {unused} of {prompts} prompts unused ({which}): {arithmetic}. With "
            f"{prompts - unused} or {prompts - unused + takes} prompts it would leave none"
        )


def check_lengths(
    datasets: Sequence[Any], tokenizer: PreTrainedTokenizerBase, args: PPOConfig, model: nn.Module, reference: Reference
) -> None:
    """Raise ValueError where prompt and completion may be longer than a model's positions or tokens_per_micro_batch."""
    limits = {
        "the policy has {} positions": max_positions(model),
        "the reference has {} positions": reference.max_positions,
        "tokens_per_micro_batch is {}": args.tokens_per_micro_batch,
    }
    known = {role: limit for role, limit in limits.items() if limit is not None}
    if not known:
        return
    role = min(known, key=lambda each: known[each])  # the one with the fewest
    left = known[role] - args.max_completion_length
    if args.max_prompt_length is not None and args.max_prompt_length <= left:
        return
    most = args.max_prompt_length or 100 * max(left, 1)  # a text of 100 MB is not tokenised to be refused
    longest = min(_longest_prompt(datasets, tokenizer, args, left, most), most)
    if longest > left:
        up_to = "at least" if args.max_prompt_length is None and longest == most else "up to"
        raise ValueError(
            f"prompts of {up_to} {longest} tokens and max_completion_length = {args.max_completion_length} make "
            f"{longest + args.max_completion_length}, and {role.format(known[role])}. Set "
            f"max_prompt_length to at most {max(left, 1)}, or make max_completion_length smaller."
        )


def _longest_prompt(
    datasets: Sequence[Any], tokenizer: Any, args: PPOConfig, left: int, most: int, without: str = ""
) -> int:
    """Tokens of the longest prompt that may have more than `left`, or 0; of one longer than `most`, more than those.

    without: an argument of the chat template that is not this tokenizer's.
    """
    longest = 0
    row: Any
    for row in (row for dataset in datasets for row in _all_rows(prompt_rows(dataset))):
        # A text has no more tokens than bytes, and a few: most prompts need not be tokenised to be known as short.
        if not isinstance(row["prompt"], str) or len(row["prompt"].encode()) + 8 > left:
            template = template_arguments(row, args.chat_template_kwargs)
            template.pop(without, None)
            longest = max(longest, len(encode_prompt(tokenizer, row["prompt"], template, most)))
    return longest


def check_judge_lengths(datasets: Sequence[Any], tokenizer: Any, args: PPOConfig, judges: Sequence[Any]) -> None:
    """Raise ValueError where what a reward model will read, prompts uncut, may be longer than it has positions.

    Another tokenizer than the policy's may make any number of tokens of a completion: then of the prompts alone. One
    with a model_max_length cuts what is longer.
    """
    for judge in [each for each in judges if isinstance(each, RewardModel)]:
        limit, own = judge.positions, judge.tokenizer
        if limit is not None and own.model_max_length > limit:
            same = own.get_vocab() == tokenizer.get_vocab()
            new = args.max_completion_length if same else 0
            tokens = _longest_prompt(datasets, own, args, limit - new, 100 * limit, without="chat_template")
            of = f" = {tokens} of a prompt + max_completion_length = {new}" if same else " of a prompt"
            judge.check_length(tokens + new, of)


def check_datasets(
    train: Any, evaluation: Any, args: PPOConfig, tokenizer: PreTrainedTokenizerBase, judges: Sequence[Any]
) -> tuple[Any, Any]:
    """Both datasets checked; the evaluation's may be a dictionary of several. judges: the reward functions."""
    if train is not None:
        train = check_dataset(train, "train_dataset")
        check_rollout_size(len(train), args)
    if isinstance(evaluation, dict):
        evaluation = {name: check_dataset(d, f"eval_dataset[{name!r}]") for name, d in evaluation.items()}
    elif evaluation is not None:
        evaluation = check_dataset(evaluation, "eval_dataset")
    for name, datasets in {"train_dataset": listed(train, None), "eval_dataset": listed(None, evaluation)}.items():
        for dataset in datasets:
            check_templates(dataset, name, args, tokenizer, judges)
    check_judge_lengths(listed(train, evaluation), tokenizer, args, judges)
    return train, evaluation


def listed(train: Any, evaluation: Any) -> list[Dataset]:
    """All prompt datasets in one list."""
    several = list(evaluation.values()) if isinstance(evaluation, dict) else [evaluation]
    return [dataset for dataset in (train, *several) if dataset is not None]


class RolloutSampler(Sampler):
    """Indices as the dataloader must yield them: each rollout's prompts, once for every micro-batch made of it.

    The Trainer counts one dataloader batch per micro-batch; the repeats are what a rollout is used for. The order
    depends on the seed and on `rollouts_done()` alone, so every process and every resumed run draws the same. (Not on
    an epoch that the Trainer sets: accelerate's wrappers do not pass it on where batches were skipped.)
    """

    def __init__(
        self, size: int, per_rollout: int, repeats: int, seed: int, shuffle: bool, rollouts_done: Callable[[], int]
    ):
        self.size, self.per_rollout, self.repeats, self.seed, self.shuffle = size, per_rollout, repeats, seed, shuffle
        self.per_pass, self.rollouts_done = size // per_rollout, rollouts_done

    def __len__(self) -> int:
        return self.per_pass * self.per_rollout * self.repeats

    def order(self, passes_done: int) -> Sequence[int]:
        """Indices of all prompts, as one pass over them takes them; the last ones may be left over."""
        if not self.shuffle:
            return range(self.size)
        generator = torch.Generator().manual_seed(self.seed + 1_000_003 * passes_done)
        return torch.randperm(self.size, generator=generator).tolist()

    def prompts_of(self, rollout: int) -> Sequence[int]:
        """Indices of the prompts of a run's rollout, counted from 0, over all processes."""
        passes_done, within = divmod(rollout, self.per_pass)
        return self.order(passes_done)[within * self.per_rollout : (within + 1) * self.per_rollout]

    def __iter__(self):
        order = self.order(self.rollouts_done() // self.per_pass)
        for start in range(0, self.per_pass * self.per_rollout, self.per_rollout):
            for _ in range(self.repeats):
                yield from order[start : start + self.per_rollout]


def place_reference(reference: Reference, args: PPOConfig) -> None:
    """The reference to the device of training, in the place that `args` says. ValueError where that cannot be."""
    if args.reference_placement:
        if type(reference) is not FrozenReference:
            raise ValueError(
                f"reference_placement={args.reference_placement!r} is for a frozen model; a "
                f"{type(reference).__name__} lies where its policy does, or where it puts itself"
            )
        reference.placement = Placement(reference.model, args.reference_placement)
    reference.to(args.device)


def rollout_sampler(dataset: Any, args: PPOConfig, rollouts_done: Callable[[], int]) -> RolloutSampler:
    """The order of a dataset's prompts, in a run that has made `rollouts_done()` rollouts."""
    return RolloutSampler(
        size=len(dataset),
        per_rollout=args.episodes_per_rollout,
        repeats=args.micro_batches_per_rollout,
        seed=args.seed if args.data_seed is None else args.data_seed,
        shuffle=args.train_sampling_strategy != "sequential",
        rollouts_done=rollouts_done,
    )
