"""TokenKLCallback: in any Trainer, how far the policy has moved from a reference on a fixed set of prompts.

    trainer = SFTTrainer(...)  # or any other of transformers or TRL
    trainer.add_callback(TokenKLCallback(reference, prompts, every=100, trainer=trainer))

Why the trainer: a callback is not handed it, and trackers (TensorBoard, W&B, trackio) are callbacks too, called before
any that is added later, with logs that only the Trainer starts. With `trainer` the numbers go through its log, which
reaches all of them. It has no effect on training, and continues prompts greedily.
"""

import logging
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from klft.diagnostics.records import TokenKLLog
from klft.diagnostics.report import write_report
from klft.generation import sample_completions
from klft.models import base_of, check_positions, check_vocabularies, max_positions, vocab_size
from klft.prompts import (
    TEMPLATE_COLUMNS,
    Encoded,
    Prompt,
    encode_prompts,
    encode_texts,
    eos_ids,
    pad,
    pad_id,
    template_arguments,
)
from klft.references import Reference, resolve_reference
from klft.scores import check_temperature
from klft.scoring import score_texts
from klft.writing import KL_FILES, check_unused, remove_files

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, ProcessorMixin

logger = logging.getLogger(__name__)


class TokenKLCallback(TrainerCallback):
    """Every `every` steps, and after the last one, scores probes: kl/... scalars, Parquet, and a page at the end.

    The scalars are those of `klft.diagnostics.scalars`, without the sampled estimates k1, k2, k3: the policy samples
    neither given texts nor greedy continuations. Tokens go to output_dir/kl/tokens_*.parquet, the page to
    output_dir/kl/report.html. All processes score all probes, so that none waits for another, whatever it holds of the
    model; the first one writes.

    Args:
        reference: a model (it is frozen, and moved to the policy's device), a FrozenReference, an AdapterReference, or
            None for a policy with a PEFT adapter: then the policy with its adapter off.
        probe_prompts: strings or conversations, which the policy continues greedily, anew each time; or
            {"prompt", "completion"} (and what else `encode_texts` takes as a dictionary), which are scored as they are.
            A dictionary may have `tools` and `chat_template_kwargs`; those of the training's arguments hold for all.
        max_length: of a probe, in tokens. A prompt that the policy continues keeps its end, a completion its beginning.
        max_new_tokens: that a prompt is continued by, at most.
        batch_size: probes at a time; top_k: likeliest tokens of both models to keep.
        trainer: the numbers go through `Trainer.log`. Without, they go to state.log_history, and into the next logs for
            callbacks that were added after this one: trackers do not see them.
        output_dir: instead of the trainer's own; and prefix: in front of the scalars' names. Both are for trainers that
            write kl/... themselves, as PPOTrainer does of its rollouts.
        overwrite: remove the tables and the page of another run, instead of refusing to write among them.

    Raises ValueError when training starts for a reference that would move with the policy or has another vocabulary,
    where no probe has a token to score, and where the folder holds another run's tables that this one does not resume.
    """

    def __init__(
        self,
        reference: "Reference | PreTrainedModel | None",
        probe_prompts: Sequence[Prompt | dict[str, Any]],
        every: int = 100,
        *,
        max_new_tokens: int = 64,
        max_length: int = 512,
        batch_size: int = 8,
        temperature: float = 1.0,
        top_k: int = 5,
        trainer: Trainer | None = None,
        output_dir: str | None = None,
        prefix: str = "",
        overwrite: bool = False,
    ):
        if every < 1 or not 0 < max_new_tokens < max_length:
            raise ValueError(
                "TokenKLCallback needs every >= 1 and 0 < max_new_tokens < max_length; got "
                f"every={every}, max_new_tokens={max_new_tokens}, max_length={max_length}"
            )
        if isinstance(probe_prompts, str) or not len(probe_prompts):
            raise ValueError("TokenKLCallback: probe_prompts must be a list of at least one prompt")
        check_temperature(temperature)
        self.reference, self.every, self.trainer = reference, every, trainer
        self.max_new_tokens, self.output_dir, self.prefix = max_new_tokens, output_dir, prefix
        self.overwrite, self._claimed = overwrite, set[Path]()
        self.options = {
            "batch_size": batch_size, "max_length": max_length, "temperature": temperature, "top_k": top_k,
        }  # fmt: skip
        self._probes = list(probe_prompts)
        self._log: TokenKLLog | None = None
        self._last, self._pending = -1, {}

    # --- what the Trainer calls --------------------------------------------------------------------------------------

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        processing_class: "PreTrainedTokenizerBase | ProcessorMixin | None" = None,
        **kwargs: object,
    ) -> None:
        if processing_class is None or model is None:
            raise ValueError("TokenKLCallback needs the tokenizer: give the Trainer a processing_class")
        tokenizer: Any = getattr(processing_class, "tokenizer", processing_class)  # a processor has one
        self._tokenizer: PreTrainedTokenizerBase = tokenizer
        # The training's, as PPO's and TRL's trainers have it.
        self._template = getattr(args, "chat_template_kwargs", None)
        self.reference = reference = resolve_reference(self.reference, model)
        self._shared_vocab = min(vocab_size(model), reference.vocab_size)
        check_vocabularies(self._tokenizer, policy=vocab_size(model), reference=reference.vocab_size)
        reference.to(next(model.parameters()).device)
        lengths = self._prepare()
        check_positions(max(lengths), model=max_positions(model), reference=reference.max_positions)
        self._last = -1
        self.folder = Path(self.output_dir or args.output_dir or ".")
        if state.global_step == 0 and self.folder not in self._claimed:  # neither resumed nor trained a second time
            self._claim(state)
        self._claimed.add(self.folder)
        if state.is_world_process_zero:
            names = {"model": base_of(model).config._name_or_path, "reference": reference.name}
            self._log = TokenKLLog(self.folder, self._tokenizer, temperature=self.options["temperature"], **names)
        if self.trainer is None and args.report_to:
            logger.warning("TokenKLCallback: %s will not see kl/...; pass trainer=trainer", ", ".join(args.report_to))

    def on_step_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **kwargs: object,
    ) -> None:
        # The last step's belongs here: afterwards trackers close.
        if state.global_step % self.every == 0 or state.global_step >= state.max_steps or control.should_training_stop:
            self._measure(args, state, control, model)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: object,
    ) -> None:
        if logs is not None:
            logs |= self._pending
        self._pending = {}

    def on_train_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **kwargs: object,
    ) -> None:
        self._measure(args, state, control, model)
        if self._log is not None:
            write_report(self.folder, self.folder / "kl" / "report.html")

    # --- what it does ------------------------------------------------------------------------------------------------

    def _claim(self, state: TrainerState) -> None:
        if self.overwrite and state.is_world_process_zero:
            remove_files(self.folder, KL_FILES)
        elif not self.overwrite:  # on all processes alike: none has written yet
            way_out = "Resume it, replace it with TokenKLCallback(..., overwrite=True), or name another output_dir."
            check_unused(self.folder, KL_FILES, way_out)

    def _prepare(self) -> list[int]:
        """Encode the probes once: those with a completion whole, the others as prompts. How long each may become."""
        given = {
            i: p
            for i, p in enumerate(self._probes)
            if isinstance(p, dict) and set(p) - {*TEMPLATE_COLUMNS} != {"prompt"}
        }
        self._fixed = Encoded([], [], [])
        if given:
            encoded = encode_texts(
                self._tokenizer, list(given.values()), max_length=self.options["max_length"], template=self._template
            )
            self._fixed = encoded._replace(sample_ids=[list(given)[i] for i in encoded.sample_ids])
        open_ended: dict[int, Any] = {
            i: p if isinstance(p, dict) else {"prompt": p} for i, p in enumerate(self._probes) if i not in given
        }
        prompts = [row["prompt"] for row in open_ended.values()]
        templates = [template_arguments(row, self._template) for row in open_ended.values()]
        keep = self.options["max_length"] - self.max_new_tokens
        encoded = encode_prompts(self._tokenizer, prompts, keep, templates)
        self._prompts = dict(zip(open_ended, encoded, strict=True))
        return [*map(len, self._fixed.ids), *(len(prompt) + self.max_new_tokens for prompt in self._prompts.values())]

    def _measure(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module | None
    ) -> None:
        """Score the probes at this step, once."""
        if state.global_step == self._last or model is None:
            return
        self._last = state.global_step
        written = self._continue(model)
        probes = Encoded(
            self._fixed.ids + written,
            self._fixed.prompt_lengths + [len(prompt) for prompt in self._prompts.values()],
            self._fixed.sample_ids + list(self._prompts),
        )
        # The policy's forward is in the Trainer's precision. The reference's too, or its rounding would count as KL.
        precision = torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else None
        with torch.autocast(args.device.type, precision) if precision else nullcontext():
            for batch in score_texts(model, self.reference, self._tokenizer, probes, **self.options):
                if self._log is not None:
                    self._log.add(
                        batch.scores, batch.token_ids, batch.attention_mask, step=state.global_step,
                        scored=batch.mask, is_prompt=batch.is_prompt, sample_ids=batch.sample_ids,
                    )  # fmt: skip
        if self._log is not None:
            self._log.close()
            metrics = {self.prefix + name: value for name, value in self._log.scalars().items()}
            self._publish(metrics, state, control)

    def _continue(self, model: Any) -> list[list[int]]:
        """Each prompt's ids and the policy's greedy continuation of it, up to and including the first end.

        Greedy over the ids that both models have, whatever else the model's own generation_config asks for.
        """
        from transformers import GenerationConfig

        ends = eos_ids(model, self._tokenizer)
        config = GenerationConfig(
            max_new_tokens=self.max_new_tokens, do_sample=False, eos_token_id=ends or None,
            pad_token_id=pad_id(self._tokenizer),
        )  # fmt: skip
        prompts, size, device = (
            list(self._prompts.values()),
            self.options["batch_size"],
            next(model.parameters()).device,
        )
        written = []
        for start in range(0, len(prompts), size):
            rows = prompts[start : start + size]
            ids, mask = pad(rows, pad_id(self._tokenizer))
            said, _ = sample_completions(model, ids.to(device), mask.to(device), config, self._shared_vocab)
            written += [row + c[m].tolist() for row, c, m in zip(rows, said.completion_ids, said.mask, strict=True)]
        return written

    def _publish(self, metrics: dict[str, float], state: TrainerState, control: TrainerControl) -> None:
        if self.trainer is None:
            state.log_history.append(metrics | {"epoch": state.epoch, "step": state.global_step})
            self._pending = metrics
        else:
            should_log = control.should_log
            # Not trainer.log: TRL's would hand out its running averages here, and start them anew.
            Trainer.log(self.trainer, dict(metrics))
            control.should_log = should_log  # the Trainer's own log of this step is still to come
