"""Reward functions: callables with TRL GRPO's signature, and sequence-classification models with their own tokenizer.

    f(prompts, completions, completion_ids, trainer_state=..., log_metric=..., log_extra=..., **columns) -> list

May be async: all run together, in one event loop for the trainer's life, so a client may be kept between calls.
One number per completion, or None where the function does not apply: it is left out of the weighted sum. A completion
that no function judged counts in no metric of scores, and is trained on the KL penalty alone, as if its score were 0.
A wrong length, a non-number, NaN or infinity is an error that names the function, the index and the prompt. Texts are
those of `decode_completions`: with special tokens that the policy wrote, without BOS, EOS and padding.
Logged as reward/<__name__>/mean; reward/score/* is the weighted sum of all, so a function that is called `score` is
logged as score_2, like the second of any name.
"""

import copy
import functools
import inspect
import math
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor
from transformers import PreTrainedModel
from transformers.utils import logging

from klft.exits import within
from klft.generation import Completions
from klft.loading import load_model, load_tokenizer
from klft.models import evaluating, max_positions, position_offset
from klft.parallel import Placement
from klft.ppo.guards import on_all_ranks
from klft.ppo.reward_loop import RewardLoop
from klft.prompts import join_turns

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.get_logger(__name__)

RewardFunction = Callable[..., Any]
"""f(prompts, completions, completion_ids, **columns) -> one number per completion, or an awaitable of that."""
RewardFunctions = RewardFunction | PreTrainedModel | str | Sequence[RewardFunction | PreTrainedModel | str]
"""One or several of: a reward function, a sequence-classification model or its id."""


class RewardModel:
    """A sequence-classification model as a reward function over text.

    With one output the reward is its raw logit; with several it is the probability of `label` (a name in id2label or
    an index), between 0 and 1: the softmax's, or the sigmoid's where the config says multi_label_classification.
    Completions are decoded by the policy's tokenizer and read by this model's own. `placement`: replicated, sharded or
    offloaded, see klft.parallel.Placement.
    """

    def __init__(
        self,
        model: str | PreTrainedModel,
        tokenizer: "PreTrainedTokenizerBase | None" = None,
        *,
        label: str | int | None = None,
        batch_size: int = 64,
        placement: str = "replicated",
        **model_init_kwargs: Any,
    ):
        trust = bool(model_init_kwargs.get("trust_remote_code", False))
        if isinstance(model, str):
            model = load_model(model, "reward model", classifier=True, **model_init_kwargs)
        if not type(model).__name__.endswith("ForSequenceClassification"):
            raise TypeError(
                "a reward model must be a sequence-classification model (AutoModelForSequenceClassification), "
                f"got {type(model).__name__}"
            )
        judge: Any = model
        self.model = judge.eval().requires_grad_(False)
        self.placement = Placement(judge, placement)
        own = (judge.config._name_or_path, "reward model")
        self.tokenizer = _padding(tokenizer or load_tokenizer(*own, trust_remote_code=trust), judge)
        self.batch_size = batch_size
        self.label = self._label_index(label)
        self.__name__ = str(judge.config._name_or_path).rstrip("/").split("/")[-1] or type(judge).__name__

    def _label_index(self, label: str | int | None) -> int | None:
        names = {str(name): int(index) for index, name in (self.model.config.id2label or {}).items()}
        outputs = int(self.model.config.num_labels or 1)
        if outputs == 1 and label is None:
            return None
        if outputs == 1:
            raise ValueError(
                f"this reward model has one output, whose raw value is the reward (the probability of its only label "
                f"would always be 1); leave `label` out, got {label!r}"
            )
        index = names.get(label) if isinstance(label, str) else label
        if index is None or not 0 <= index < outputs:
            raise ValueError(
                f"a reward model with {outputs} labels needs `label`: the one whose probability is the reward, out of "
                f"{', '.join(names)}; got {label!r}"
            )
        return index

    def to(self, device: torch.device | str) -> None:
        """Move the model to a device; see klft.parallel.Placement. A collective where it is sharded."""
        self.placement.to(device)

    def __call__(
        self, prompts: list, completions: list, *, template_arguments: list[dict] | None = None, **_: Any
    ) -> list[float]:
        templates = template_arguments or [{}] * len(prompts)
        texts = [_whole_text(p, c, self.tokenizer, t) for p, c, t in zip(prompts, completions, templates, strict=True)]
        rewards: list[float] = []
        with evaluating(self.model), self.placement.in_use():
            for start in range(0, len(texts), self.batch_size):
                batch = self.tokenizer(
                    texts[start : start + self.batch_size],
                    padding=True,
                    truncation=True,
                    return_tensors="pt",
                    # A chat template writes the special tokens itself.
                    add_special_tokens=isinstance(prompts[start], str),
                ).to(self.model.device)
                self.check_length(batch["input_ids"].shape[1])
                # A decoder finds a row's last token by the pad id of its config, which need not be the tokenizer's.
                padding = batch["attention_mask"] == 0
                batch["input_ids"] = batch["input_ids"].masked_fill(padding, self.model.config.pad_token_id)
                rewards += self._rewards(self.model(**batch).logits.float()).tolist()
        return rewards

    @property
    def positions(self) -> int | None:
        """The longest text it can read, in tokens; None: any."""
        positions = max_positions(self.model)
        return None if positions is None else positions - position_offset(self.model)

    def check_length(self, tokens: int, of: str = "") -> None:
        """Raise ValueError for a text of more tokens than it has positions. of: their arithmetic."""
        positions = self.positions
        if positions is not None and tokens > positions:
            raise ValueError(
                f"reward model {self.__name__!r} reads {tokens} tokens{of or ' of prompt and completion'}, and has "
                f"{positions} positions. Make prompts or completions shorter, or set its tokenizer's "
                "model_max_length: then texts lose their beginning"
            )

    def _rewards(self, logits: Tensor) -> Tensor:
        if self.label is None:
            return logits[:, 0]
        several = self.model.config.problem_type == "multi_label_classification"
        return (logits.sigmoid() if several else logits.softmax(-1))[:, self.label]


def _padding(tokenizer: Any, model: Any) -> Any:
    """A copy that can pad, by EOS or any id (a decoder finds a row's last token by the id its config names).

    Too long a text loses its beginning: what is judged is the completion, and that comes last.
    """
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.truncation_side = "left"
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.convert_ids_to_tokens(0)
    if model.config.pad_token_id is None:
        model.config.pad_token_id = tokenizer.pad_token_id
    return tokenizer


def _whole_text(prompt: Any, completion: Any, tokenizer: Any, template: dict[str, Any] | None = None) -> str:
    if isinstance(prompt, str):
        return prompt + completion
    arguments = {name: value for name, value in (template or {}).items() if name != "chat_template"}  # the policy's
    return tokenizer.apply_chat_template(join_turns(prompt, completion), tokenize=False, **arguments)


def as_reward_functions(reward_funcs: RewardFunctions) -> list[RewardFunction]:
    """One or several callables, model ids or sequence-classification models -> callables, each with a `__name__`."""
    listed: list[Any] = list(reward_funcs) if isinstance(reward_funcs, (list, tuple)) else [reward_funcs]
    if not listed:
        raise ValueError("reward_funcs is empty: PPO needs at least one reward function")
    made = [RewardModel(f) if isinstance(f, (str, PreTrainedModel)) else f for f in listed]
    for f in made:
        if not callable(f):
            raise TypeError(f"reward_funcs: expected a callable, a model id or a model, got {type(f).__name__}")
    return made


def reward_models(functions: Sequence[RewardFunction]) -> dict[str, PreTrainedModel]:
    """The models among the reward functions, by the names they are logged under."""
    named = zip(reward_names(functions), functions, strict=True)
    return {name: f.model for name, f in named if isinstance(f, RewardModel)}


def move_reward_models(
    functions: Sequence[RewardFunction], device: torch.device, placement: str | None, tp_size: int
) -> None:
    """Reward models to the device that the policy is trained on; other functions see to themselves.

    `placement`: of them all, None as each was made. Raises ValueError for sharded ones with tensor
    parallelism: one rank of each group asks.
    """
    for function in functions:
        if isinstance(function, RewardModel):
            if placement:
                function.placement = Placement(function.model, placement)
            if tp_size > 1 and function.placement.kind == "sharded":
                raise ValueError(
                    f"reward model {function.__name__!r}: sharded models need every process, and under tensor "
                    "parallelism one of each group asks. Take replicated or offloaded"
                )
            function.to(device)


def reward_weights(weights: list[float] | None, functions: int) -> Tensor:
    """One weight per reward function, 1 by default. Raises ValueError if their number is another."""
    if weights is not None and len(weights) != functions:
        raise ValueError(f"{functions} reward function(s), but reward_weights={weights}")
    return torch.tensor(weights or [1.0] * functions, dtype=torch.float32)


def reward_name(f: Any) -> str:
    """The name of a reward function; a partial has its function's."""
    while isinstance(f, functools.partial):
        f = f.func
    return getattr(f, "__name__", type(f).__name__)


def reward_names(functions: Sequence[RewardFunction]) -> list[str]:
    """The names they are logged under: their own, numbered from 2 on where another, or klft itself, has it already."""
    taken = {"score", "total"}  # reward/score/mean and reward/total/mean are of all functions together
    names = []
    for function in functions:
        name = own = reward_name(function)
        number = 1
        while name in taken:
            number += 1
            name = f"{own}_{number}"
        taken.add(name)
        names.append(name)
    return names


def score_completions_by(
    functions: Sequence[RewardFunction],
    accelerator: Accelerator,
    rows: list[dict],
    completions: Completions,
    texts: list,
    *,
    trainer_state: Any,
    loop: RewardLoop | None = None,
    known: dict[str, list[float]] | None = None,
    templates: list[dict[str, Any]] | None = None,
    timeout: float | None = None,
    tp_size: int = 1,
) -> tuple[Tensor, dict[str, list], dict[str, list[float]]]:
    """(raw scores [B, K] of this process, columns for the table of completions, metrics that functions logged).

    `known`: numbers of this process's prompts that are logged with them. `templates`: each prompt's template_arguments,
    for the reward models. `timeout`: seconds that a function may take. `tp_size`: the ranks of a
    tensor-parallel group hold the same completions; the first of them asks. The metrics are those of all processes. An
    error on one rank ends all ranks with it.
    """
    dataset_columns = {name: [row[name] for row in rows] for name in rows[0] if name != "prompt"}
    ids = [row[m].tolist() for row, m in zip(completions.completion_ids, completions.mask, strict=True)]
    columns: dict[str, list] = {}
    local: dict[str, list[float]] = dict(known or {})

    def call() -> Tensor:
        return call_reward_functions(
            functions,
            [row["prompt"] for row in rows],
            texts,
            ids,
            dataset_columns,
            templates,
            loop=loop,
            timeout=timeout,
            rank=accelerator.process_index,
            trainer_state=trainer_state,
            log_metric=lambda name, value: local.setdefault(name, []).append(float(value)),
            log_extra=lambda name, values: _keep_column(columns, name, list(values), len(rows)),
        )

    rank = accelerator.process_index
    scores = on_all_ranks(accelerator, call if rank % tp_size == 0 else lambda: None)
    every = gather_object([(scores, columns, local) if tp_size > 1 else (None, None, local)])
    if tp_size > 1:
        scores, columns, _ = every[rank - rank % tp_size]
    logged: dict[str, list[float]] = {}
    for _, _, of_rank in every[::tp_size]:
        for name, values in of_rank.items():
            logged.setdefault(name, []).extend(values)
    return scores.to(accelerator.device), columns, logged


def _keep_column(columns: dict[str, list], name: str, values: list, rows: int) -> None:
    """A column of the table of completions; one of another length is left out, and training goes on."""
    if len(values) == rows:
        columns[name] = values
    else:
        logger.warning_once(
            f"log_extra({name!r}, ...): {len(values)} value(s) for {rows} completions, so the column is left out of "
            "the table of completions: give one value per completion"
        )


def call_reward_functions(
    functions: Sequence[RewardFunction],
    prompts: list,
    completions: list,
    completion_ids: list,
    columns: dict,
    templates: list[dict[str, Any]] | None = None,
    *,
    loop: RewardLoop | None = None,
    timeout: float | None = None,
    rank: int = 0,
    **extra: Any,
) -> Tensor:
    """Scores [B, K], float32; NaN where a function returned None. Raises ValueError for anything that is no number.

    Async functions run together, in `loop`; without one, in a loop of this call's own. TimeoutError that names `rank`
    if one function, or the async ones together, take longer than `timeout` seconds.
    """
    given = {**columns, **extra, "prompts": prompts, "completions": completions, "completion_ids": completion_ids}
    of_models = given | {"template_arguments": templates}
    names, results = reward_names(functions), []
    for name, f in zip(names, functions, strict=True):
        call = functools.partial(_call, name, f, of_models if isinstance(f, RewardModel) else given)
        results.append(within(timeout, lambda name=name: f"rank {rank}: reward function {name!r}", call))
    waiting = {i: r for i, r in enumerate(results) if inspect.isawaitable(r)}
    if waiting:
        left = {i: names[i] for i in waiting}

        async def result(i: int) -> None:
            results[i] = await waiting[i]
            del left[i]

        within(
            timeout,
            lambda: f"rank {rank}: reward function {', '.join(map(repr, left.values()))}",
            lambda: (loop or RewardLoop()).results([result(i) for i in waiting]),
        )
    columns_of_scores = [_checked(reward_name(f), r, prompts) for f, r in zip(functions, results, strict=True)]
    return torch.tensor(columns_of_scores, dtype=torch.float32).reshape(len(functions), len(prompts)).T


def _call(name: str, function: RewardFunction, given: dict[str, Any]) -> Any:
    """function(**given). Raises TypeError with the way out where its signature does not fit."""
    try:
        return function(**given)
    except TypeError as error:
        with suppress(ValueError):  # of a builtin that has no signature
            try:
                inspect.signature(function).bind(**given)
            except TypeError as unfit:
                way_out = "add **_ to its arguments for those it does not use; another name must be a prompts' column"
                called = f"It is called with {', '.join(given)} by name: {way_out}"
                raise TypeError(f"reward function {name!r} {unfit}. {called}") from error
        raise


def is_judged(scores: Tensor) -> Tensor:
    """[B, K] -> [B]: whether any function gave a number."""
    return ~scores.isnan().all(-1)


def _checked(name: str, returned: Any, prompts: list) -> list[float]:
    if isinstance(returned, Tensor):
        returned = returned.detach().float()
    if hasattr(returned, "tolist"):
        returned = returned.tolist()
    if not isinstance(returned, (list, tuple)) or len(returned) != len(prompts):
        got = "None (is its `return` missing?)" if returned is None else f"a {type(returned).__name__}"
        got = f"{len(returned)} values" if isinstance(returned, (list, tuple)) else got
        raise ValueError(f"reward function {name!r} must return one number per completion: {len(prompts)}, got {got}")
    for index, value in enumerate(returned):
        if not _is_score(value):
            raise ValueError(
                f"reward function {name!r} returned {value!r:.80} for completion {index}, prompt "
                f"{prompts[index]!r:.80}; expected a finite number, or None where it does not apply"
            )
    return [math.nan if value is None else float(value) for value in returned]


def _is_score(value: Any) -> bool:
    if value is None:
        return True
    try:
        return not isinstance(value, (str, bytes)) and abs(float(value)) <= torch.finfo(torch.float32).max
    except (TypeError, ValueError, OverflowError):
        return False
