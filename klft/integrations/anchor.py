"""KLAnchorMixin: a KL penalty in the loss of somebody else's trainer.

Tokens count whose label is not -100 (SFTTrainer, transformers.Trainer), or completion_mask * tool_mask (GRPOTrainer).
One forward of the policy: a hook on its backbone keeps the hidden states that the trainer's own loss is computed from;
the reference is called with the very same arguments; the KL is taken from both without logits, divided as this trainer
divides its loss, and added to it. With a coefficient of 0 training is bit for bit what it was, and the KL is measured.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from klft.integrations.backbone import BackboneCalls
from klft.integrations.batch import Batch, completion_batch, labelled_batch
from klft.integrations.checks import (
    as_penalty,
    check_anchor,
    check_order,
    check_sharding,
    run_self_test,
    trains_completions,
)
from klft.integrations.measure import Measurements, PenaltyPart, loss_scores, measure
from klft.integrations.state import PenaltyState
from klft.masked import scatter_masked
from klft.models import base_of, evaluating
from klft.parallel import save_gathered
from klft.penalty import KLPenalty, TokenKL
from klft.scoring import Sharding
from klft.writing import KL_FILES, check_unused

if TYPE_CHECKING:
    from transformers import Trainer

    from klft.integrations.tokens import TokenTables

    _Base = Trainer
else:
    _Base = object

_CHARGED = "klft_charged"  # in a batch whose advantages hold the KL of later tokens


class KLAnchorMixin(_Base):
    """Adds coef * KL per token to a trainer's loss, and `kl/...` to its logs. Put it before the trainer class.

    Example:
        from trl import SFTTrainer
        class AnchoredSFT(KLAnchorMixin, SFTTrainer): ...

        penalty = KLPenalty(ref_model, coef=0.1, direction="forward", estimator="exact", placement="loss")
        args = SFTConfig("out", max_steps=2)
        AnchoredSFT(model, args=args, train_dataset=texts, processing_class=tokenizer, penalty=penalty).train()

    Args:
        penalty: a KLPenalty; or, where the trainer itself makes the policy (from a name, with a peft_config), a
            function of the policy that gives one: `lambda model: KLPenalty(AdapterReference(model), ...)`.
            In a trainer of labelled texts estimator="exact", placement="loss". In GRPOTrainer every other as well: what
            belongs in the reward goes into per-token advantages, once per rollout, before its first update. k2 and k3
            in the loss are weighted by each token's own importance ratio, whatever importance_sampling_level says.
        measure_every: write the tokens of every so many optimizer steps to output_dir/kl, and a page in the end;
            0: never. With a coefficient of 0 the KL is measured in those steps alone (0: in all).
        self_test: check policy, reference and optimizer on three short rows before the first step.
        kl_shard_vocab: vocabulary sharding of the KL, as PPOConfig's. auto: follow the head's placement; tp: its
            tensor-parallel shards; dp: shard over data-parallel ranks, all-gather hidden states; none: replicated.

    The controller is shown nats per sequence once per optimizer step. Logged are the penalty's own KL and k1, k2, k3
    (of sampled tokens) over all tokens since the last log; the other direction and entropies over those of the last
    step before it. Raises ValueError or TypeError for what cannot be right, before training, and
    RuntimeError, naming the versions, where transformers or TRL are not as this klft knows them.
    """

    def __init_subclass__(cls, **kwargs: Any):
        super().__init_subclass__(**kwargs)
        check_order(cls)

    def __init__(
        self,
        *args: Any,
        penalty: KLPenalty | Callable[[nn.Module], KLPenalty] | None = None,
        measure_every: int = 0,
        self_test: bool = True,
        kl_shard_vocab: Sharding = "auto",
        **kwargs: Any,
    ):
        super().__init__(*args, **kwargs)
        assert self.model is not None
        self.penalty = as_penalty(penalty, self.model)
        check_anchor(self, self.penalty, measure_every)
        parts = PenaltyPart.of(self.penalty, self.args, kl_shard_vocab)
        check_sharding(self.model, parts[0].scorer)
        self.penalty.reference.to(self.args.device)
        self._anchor = _Anchor(self, parts, measure_every, self_test)
        self.add_callback(PenaltyState(self.penalty, "KLAnchor"))
        self.add_callback(AnchorCallback(self._anchor))

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The trainer's loss, and coef * KL."""
        options = {"return_outputs": return_outputs, "num_items_in_batch": num_items_in_batch}
        anchor = self._anchor
        if not anchor.due:
            return super().compute_loss(model, inputs, **options)
        anchor.test_once(model)
        batch = anchor.batch(inputs, num_items_in_batch)  # before the trainer takes labels out of it
        anchor.charge(model, inputs, batch)
        with BackboneCalls(model) as calls:
            result: Any = super().compute_loss(model, inputs, **options)
        kl_loss = anchor.measure(model, calls, batch, num_items_in_batch)
        if kl_loss is None:
            return result
        return (result[0] + kl_loss, result[1]) if return_outputs else result + kl_loss

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As the trainer does; under FSDP2 with sharded state dicts, where it saves no model, the whole one as well.

        A checkpoint's shards are enough to resume from.
        """
        super().save_model(output_dir, _internal_call)
        if not _internal_call:
            save_gathered(self, Path(output_dir or self.args.output_dir or "."))

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """With `kl/...` since the last log, of all processes; `eval_kl/...` in evaluation (`<name>_kl/...`)."""
        logs |= self._anchor.metrics(logs)
        super().log(logs, start_time)


class _Anchor:
    """The penalty at work in a trainer: which tokens, their KL, the window of an optimizer step, what to log."""

    def __init__(self, trainer: Any, parts: list[PenaltyPart], measure_every: int, self_test: bool):
        self.trainer, self.penalty, self.parts, self.measure_every = trainer, trainer.penalty, parts, measure_every
        self.completions = trains_completions(trainer)
        self.train, self.evaluation = Measurements(), Measurements()
        self.before_log = Measurements()  # all scores, of the training steps before a log
        # Of the optimizer step so far: nats, sequences, tokens, tokens that nothing predicts.
        self.window = torch.zeros(4, dtype=torch.float64)
        # The self-test is due once before training (True), and before an evaluation that comes first (False).
        self.tests_due = {True, False} if self_test else set[bool]()
        self.tables: TokenTables | None = None

    @property
    def due(self) -> bool:
        """Whether this batch's KL is wanted."""
        return bool(self.penalty.coef) or not self.trainer.model.training or self._nth_step

    @property
    def _nth_step(self) -> bool:
        return not self.measure_every or self.trainer.state.global_step % self.measure_every == 0

    @property
    def _wants_all_scores(self) -> bool:
        """In the last step before a log, and wherever there is no loss."""
        args, state = self.trainer.args, self.trainer.state
        if not self.penalty.coef or not self.trainer.model.training:
            return True
        steps = int(state.logging_steps or 1) if args.logging_strategy == "steps" else 1
        return args.logging_strategy != "no" and (state.global_step + 1) % steps == 0

    def test_once(self, model: nn.Module) -> None:
        """Before the first training step, and before an evaluation that comes first."""
        training = self.trainer.model.training
        if training in self.tests_due:
            run_self_test(self.trainer, model, self.parts)
            self.tests_due -= {False, training}

    def batch(self, inputs: Mapping[str, Any], num_items: Tensor | int | None) -> Batch:
        """The tokens that count."""
        if self.completions:
            return completion_batch(self.trainer, inputs)
        return labelled_batch(self.trainer, inputs, num_items)

    def measure(
        self, model: nn.Module, calls: BackboneCalls, batch: Batch, num_items: Tensor | int | None
    ) -> Tensor | None:
        """coef * KL in the trainer's own normalisation, or None where nothing belongs in the loss."""
        training, all_scores = self.trainer.model.training, self._wants_all_scores
        tables = self.tables if training and self._nth_step else None
        top_k = 0 if tables is None else tables.top_k
        with self.trainer.accelerator.autocast():
            measured = measure(
                self.penalty, self.parts, model, calls.only(), batch, all_scores=all_scores, top_k=top_k
            )  # fmt: skip
        kl = measured.kl
        if tables is not None and not self.trainer.args.process_index % self.trainer.get_tp_size():
            weight = None if kl.weight is None else kl.weight[kl.mask]
            tables.add(self.trainer.state.global_step + 1, batch, measured.scores, weight)
        if training:
            self.train.add(kl, loss_scores(self.penalty))
            self._close_window(kl, num_items, batch.unpredicted)
        if all_scores:
            (self.before_log if training else self.evaluation).add(kl)
        return measured.loss

    def _close_window(self, kl: TokenKL, num_items: Tensor | int | None, unpredicted: int) -> None:
        """Once per optimizer step: show the controller all its sequences, and compare the count with the trainer's."""
        nats, episodes = self.penalty.sequence_kl(kl)
        own = [nats * episodes, episodes, int(kl.mask.sum()), unpredicted]
        self.window += torch.tensor(own, dtype=torch.float64)
        accelerator = self.trainer.accelerator
        if not accelerator.sync_gradients:
            return
        local = self.window.to(accelerator.device, torch.float64)
        self.window = torch.zeros_like(self.window)
        tp_size = self.trainer.get_tp_size()  # ranks of a group hold the same samples
        total = accelerator.reduce(local, "sum") / tp_size
        if num_items is not None and not self.completions:
            across = self.trainer.args.average_tokens_across_devices
            counts = (total if across else local / tp_size)[2:]  # the trainer divides its own count by them as well
            counted = float(counts[0])
            if float(num_items) not in (counted, float(counts.sum())):
                raise RuntimeError(
                    f"KLAnchorMixin counts {counted:.0f} tokens in this optimizer step and the trainer "
                    f"{float(num_items):.0f}: their sums would be divided differently. Check the labels that the data "
                    "collator gives: a row's first token is predicted by nothing and its label must be -100 or unused"
                )
        nats, episodes = total[:2].tolist()
        if episodes:
            self.penalty.controller.update(nats / episodes, int(episodes))

    @torch.no_grad()
    def charge(self, model: nn.Module, inputs: dict[str, Any], batch: Batch) -> None:
        """GRPO: take coef * the KL that a token leads to out of its advantage, once per rollout."""
        if self.penalty.placement == "loss" or not self.penalty.coef or _CHARGED in inputs:
            return
        if "pixel_values" in inputs:
            raise ValueError("KLAnchorMixin: a penalty in the reward does not go with images; use placement='loss'")
        forward = {"input_ids": batch.token_ids, "attention_mask": batch.real.long(), "use_cache": False}
        with evaluating(model), BackboneCalls(model) as calls, self.trainer.accelerator.autocast():
            base_of(model).base_model(**forward)
            kl = measure(self.penalty, self.parts, model, calls.only(), batch, with_loss=False).kl
        to_go = self.penalty.reward_kl(kl).flip(1).cumsum(1).flip(1)
        charged = scatter_masked(to_go[kl.mask], batch.counted)[:, inputs["prompt_ids"].shape[1] :]
        advantages = inputs["advantages"]
        advantages = advantages[:, None] if advantages.dim() == 1 else advantages
        # TRL hands the same dictionary back in every pass over a rollout.
        inputs["advantages"], inputs[_CHARGED] = advantages - self.penalty.coef * charged.to(advantages), True

    def metrics(self, logs: Mapping[str, float]) -> dict[str, float]:
        """kl/... since the last call, of all processes, if these logs are the Trainer's own, which all processes have.

        An evaluation's, or a prediction's, behind its name: its logs hold <name>_runtime.
        """
        prefixes = [name.removesuffix("runtime") for name in logs if name.endswith("_runtime")]
        metrics: dict[str, float] = {}
        if prefixes or "loss" in logs:
            for measurements in [self.evaluation] if prefixes else [self.before_log, self.train]:
                metrics |= measurements.take(
                    self.trainer.accelerator, sampled=self.completions, tp_size=self.trainer.get_tp_size()
                )
        if metrics:
            metrics["kl/coef"] = self.penalty.coef
        return {"".join(prefixes[:1]) + name: value for name, value in metrics.items()}


class AnchorCallback(TrainerCallback):
    """Opens and closes the tables of `measure_every`; a prediction, which is not logged, gets its KL as a metric."""

    def __init__(self, anchor: _Anchor):
        self._anchor = anchor

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        anchor = self._anchor
        anchor.window.zero_()  # an earlier training may have been interrupted inside a step
        if anchor.measure_every:
            from klft.integrations.tokens import TokenTables

            folder = Path(args.output_dir or ".")
            if not state.global_step:
                check_unused(folder, KL_FILES, "Resume it, remove them, or name another output_dir.")
            anchor.tables = TokenTables(anchor.trainer, folder)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        if self._anchor.tables is not None:
            self._anchor.tables.close()
            self._anchor.tables = None  # another training's are not these

    def on_predict(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, metrics: dict[str, float],
        **kwargs: object,
    ) -> None:  # fmt: skip
        metrics |= self._anchor.metrics(metrics)
