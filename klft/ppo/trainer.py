"""PPOTrainer: rollouts, rewards, the PPO loss and its KL penalty, on the frame of transformers.Trainer.

The dataloader yields prompts; `training_step` makes a rollout when the last one is used up, else takes its next
micro-batch, so one optimizer step of the Trainer is one PPO minibatch: all else is the Trainer's.
"""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from datasets import Dataset
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer, TrainerCallback, set_seed

from klft.exits import reasons_recorded
from klft.fused import fused_token_loss
from klft.fused.functions import ChunkScores
from klft.masked import masked_sum, masked_var, masked_whiten, scatter_masked
from klft.models import disable_dropout, quiet
from klft.parallel import save_gathered
from klft.penalty import TokenRule
from klft.ppo import checkpoint as ckpt
from klft.ppo import inputs as given
from klft.ppo import resume
from klft.ppo import value as value_function
from klft.ppo.adapters import require_readable_policy_head, starts_equal
from klft.ppo.collector import RolloutCollector
from klft.ppo.completions import show_completions
from klft.ppo.config import PPOConfig
from klft.ppo.cycle import Cycle
from klft.ppo.guards import FollowPolicy, SaveOnSigterm, StopOnNonFiniteGradient, saving
from klft.ppo.losses import policy_losses, value_losses
from klft.ppo.metrics import Table, loss_metrics, rollout_metrics, with_logged
from klft.ppo.progress import progress_of
from klft.ppo.rewards import RewardFunctions, as_reward_functions, reward_models, reward_names, reward_weights
from klft.ppo.rollout import Rollout, forward_with_values, reference_side
from klft.ppo.state import Pending, PPOState
from klft.references import Reference
from klft.references.checkpoint import load_reference, save_reference
from klft.scoring import Predictions, Scorer

if TYPE_CHECKING:
    from peft import PeftConfig
    from transformers.trainer_utils import TrainOutput

Rows = list[dict[str, Any]]
"""Rows of the prompt dataset, as the dataloader yields them."""


class PPOTrainer(Trainer):
    """Train a causal LM by PPO on reward minus a KL penalty against a frozen reference.

    Example:
        args = PPOConfig("out", kl_coef=0.05, max_completion_length=6, max_steps=1)
        PPOTrainer(model, reward, args, train_dataset=prompts, processing_class=tokenizer).train()

    Args:
        model: a causal LM, a PEFT model, or a model id.
        reward_funcs: one or several of: a callable (TRL GRPO's signature), a sequence-classification model or its id.
        train_dataset: a `datasets.Dataset` with a `prompt` column, text or messages; the other columns go to the
            reward functions.
        reference: a model or a klft reference. Default: the adapter switched off (PEFT), else a frozen copy.
        value_model: a causal sequence-classification model with one output. Default: a linear head on the policy.
        token_rule: how much the KL of each token of a completion counts, see klft.token_rules. Default: all alike.
        args: a PPOConfig; eval_dataset, processing_class, peft_config, callbacks, optimizers: as in TRL's trainers.

    Raises ValueError / TypeError for inputs that cannot work, before anything is trained.
    """

    args: PPOConfig
    loss_is_scaled_for_ga = True
    _gradient_seen = _ratio_seen = _tested = False  # what is checked once, before and at the first micro-batch
    _self_test_seconds, _starts_equal = 0.0, None
    _claimed: Path | None = None  # the output_dir that holds this trainer's own run
    _next_prompts: str | None = None  # hash of the prompts that the first rollout after a resume must have

    def __init__(
        self,
        model: nn.Module | str,
        reward_funcs: RewardFunctions,
        args: PPOConfig | None = None,
        train_dataset: Dataset | None = None,
        eval_dataset: Dataset | dict[str, Dataset] | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        reference: Reference | PreTrainedModel | None = None,
        value_model: PreTrainedModel | None = None,
        peft_config: "PeftConfig | None" = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[Optimizer | None, LRScheduler | None] = (None, None),
        token_rule: TokenRule | None = None,
    ):
        args = given.resolve_args(args)
        ckpt.check_writable(args)
        set_seed(args.seed)  # before an adapter is drawn: the Trainer seeds only once it has the model
        model = given.load_policy(model, args.model_options)
        args.split_tensors(getattr(model, "tp_size", None) or 1)
        tokenizer = given.resolve_tokenizer(processing_class, model, args.model_options)
        self._starts_equal = starts_equal(model, reference, peft_config)
        self.reward_funcs = reward_funcs = as_reward_functions(reward_funcs)
        train_dataset, eval_dataset = given.check_datasets(train_dataset, eval_dataset, args, tokenizer, reward_funcs)
        model, reference = given.build_policy_and_reference(
            model, reference, value_model, peft_config, tokenizer, reward_models(self.reward_funcs)
        )
        given.check_policy_can_move(model, optimizers, adapter_is_new=peft_config is not None)
        given.check_lengths(given.listed(train_dataset, eval_dataset), tokenizer, args, model, reference)
        if args.disable_dropout:
            disable_dropout(model)
        self.penalty = args.penalty(reference, token_rule)
        self.scorer = Scorer(reference, temperature=args.temperature, shard_vocab=args.kl_shard_vocab)
        require_readable_policy_head(self.scorer, model)  # and for an exact loss the reference's, before training
        self._exact_loss = args.kl_estimator == "exact" and self.penalty.placement != "reward"
        if self._exact_loss:
            given.require_readable_head(reference)
        super().__init__(
            model=model,
            args=args,
            data_collator=list,  # pyright: ignore - prompts are encoded during the rollout
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,  # pyright: ignore[reportArgumentType] - a datasets.Dataset is one
            processing_class=tokenizer,
            callbacks=callbacks,
            optimizers=optimizers,  # pyright: ignore[reportArgumentType] - any scheduler will do
        )
        self._sigterm = SaveOnSigterm(self.accelerator, saves=args.save_strategy != "no")
        stop, shown = StopOnNonFiniteGradient(self, self._resume_hint), progress_of(self)
        for callback in (stop, FollowPolicy(reference), self._sigterm, shown):
            self.add_callback(callback)
        if isinstance(warned := getattr(model, "warnings_issued", None), dict):
            warned["estimate_tokens"] = True  # batches are prompts: there are no input_ids to count
        given.place_reference(reference, self.args)
        self._collector = RolloutCollector(
            args, self.accelerator, self.penalty, self.scorer, self.reward_funcs,
            reward_weights(args.reward_weights, len(self.reward_funcs)), tokenizer, model,
        )  # fmt: skip
        self.ppo = PPOState(Cycle(args, self._data_rank, episodes=0), coef=self.penalty.coef)

    # ---- the generation cycle --------------------------------------------------------------------------------

    @property
    def _policy(self) -> nn.Module:
        assert self.model is not None
        return self.model

    @property
    def _output_dir(self) -> Path:
        return Path(self.args.output_dir or ".")

    def _resume_hint(self) -> str:
        return ckpt.resume_hint(self._output_dir)

    @property
    def _data_rank(self) -> int:
        return self.args.process_index // self.args.tp_size

    @property
    def episodes(self) -> int:
        """Completions trained on."""
        return self.ppo.episodes

    def training_step(self, model: nn.Module, inputs: Rows, num_items_in_batch: Tensor | int | None = None) -> Tensor:
        """One micro-batch, or several, see Cycle. Makes the next rollout first if the last one is used up."""
        cycle = self.ppo.cycle
        if cycle.rollout is None:
            self._test_once(model)
            self._make_rollout(model, inputs)
        loss = torch.zeros((), device=self.args.device)
        with self.ppo.phases("train", self.args.device):
            for micro, tokens in cycle.next_micro_batches():  # after target_kl none: no gradient, no change
                loss = loss + super().training_step(model, {"rollout": micro, "tokens": tokens})  # pyright: ignore
                if not self._gradient_seen:
                    self._check_gradient(micro)
        if cycle.position % self.args.gradient_accumulation_steps == 0:
            self._end_of_minibatch()
        if cycle.used_up:
            # Not before: a coefficient is constant over the epochs of a rollout.
            self.penalty.controller.update(cycle.running.sequence_kl, cycle.running.episodes)
            self.ppo.cycle = Cycle(self.args, self._data_rank, self.ppo.episodes)
        return loss

    def _test_once(self, model: nn.Module) -> None:
        if self.args.self_test and not self._tested:
            from klft.ppo.self_test import run_self_test

            fresh = None if self._starts_equal and self.state.global_step else self._starts_equal
            held = None if self.is_deepspeed_enabled else self.optimizer  # DeepSpeed's holds flat copies
            self._self_test_seconds = run_self_test(self._collector, model, held, starts_equal=fresh)
        self._tested = True

    def _check_gradient(self, micro: Rollout) -> None:
        """After the first backward with a token in it: some weight of the policy has a gradient."""
        if self.is_deepspeed_enabled or not bool(micro.mask.any()):
            return  # DeepSpeed keeps gradients elsewhere
        self._gradient_seen = True
        given.check_gradient(self._policy)

    # ---- rollout -----------------------------------------------------------------------------------------------

    def _make_rollout(self, model: nn.Module, rows: list[dict]) -> None:
        if self._next_prompts is not None:
            resume.check_prompts(self._next_prompts, rows, self._collector.tokenizer, self.args, self.accelerator)
            self._next_prompts = None
        state = self.ppo
        rollout, stats, table = self._collector.collect(model, rows, state, self.state, learn=True)
        # 10. Whiten the advantages over all processes. That divides the reward's gradient by their deviation; a KL in
        # the loss is divided alike, or `coef` would mean something else there than in the reward.
        variance = masked_var(rollout.advantages, rollout.mask, self._collector.reduce)
        rollout.advantages = masked_whiten(rollout.advantages, rollout.mask, self._collector.reduce)
        stats.advantage_scale = torch.rsqrt(variance + 1e-8).item()
        state.cycle.start(rollout, stats, self.accelerator.gather)  # pyright: ignore
        state.coef = stats.coef
        if self.args.logging_strategy == "no":
            state.train.tables.clear()  # nothing reads them; the last one is for a callback that asks for a log
        state.train.tables.append(table)
        state.episodes += len(table.sequences)

    # ---- loss --------------------------------------------------------------------------------------------------

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor | tuple[Tensor, dict[str, Tensor]]:
        """Policy + value + KL loss of one micro-batch, divided by its whole minibatch's tokens on all processes."""
        micro: Rollout = inputs["rollout"]
        mask, args = micro.mask, self.args
        if args.disable_dropout:
            quiet(model)  # as the tokens were scored
        hidden, values, _ = forward_with_values(model, self.accelerator.unwrap_model(model), micro)
        policy = Predictions(hidden[mask], self.scorer.policy_head(model))
        reference = reference_side(self.scorer, micro) if self._exact_loss else None
        value, value_clipped = value_losses(values, micro.values, micro.returns, args.cliprange_value)
        seen: list[Tensor] = []
        names = ("old_logp", "behaviour_logp", "ref_logp", "kl_weight", "advantages")
        policy_loss = fused_token_loss(
            lambda scores, *per_token: self._policy_loss(seen, scores, **dict(zip(names, per_token, strict=True))),
            **self.scorer.fused_inputs(policy, reference, micro.completion_ids[mask]),
            per_token=[getattr(micro, name)[mask] for name in names],
        )
        # Processes' gradients are averaged, so each contributes its sum times their number.
        processes = args.world_size // args.tp_size
        loss = (policy_loss + args.vf_coef * masked_sum(value, mask)) * processes / max(inputs["tokens"], 1.0)
        per_token = torch.cat(seen, 1) if seen else hidden.new_zeros(5, 0)
        if not self._ratio_seen and args.disable_dropout and per_token.numel():
            self._ratio_seen = True
            if self.ppo.cycle.position <= args.gradient_accumulation_steps:  # no step since the rollout
                given.check_first_ratio(per_token[-1] - micro.old_logp[mask])
        of_values = torch.stack([masked_sum(value.detach(), mask), masked_sum(value_clipped.float(), mask)])
        summed = ("policy_loss", "approx_kl", "ratio", "ratio_clipped", "value_loss", "value_clipped")
        sums = dict(zip(summed, torch.cat([per_token[:-1].sum(1), of_values]).tolist(), strict=True))
        sums |= {"tokens": float(mask.sum()), "nonfinite": float(not bool(loss.isfinite()))}
        for name, value in sums.items():
            self.ppo.minibatch_sums[name] += value
        return (loss, {"logp": scatter_masked(per_token[-1], mask)}) if return_outputs else loss

    def _policy_loss(
        self,
        seen: list[Tensor],
        scores: ChunkScores,
        *,
        old_logp: Tensor,
        behaviour_logp: Tensor,
        ref_logp: Tensor,
        kl_weight: Tensor,
        advantages: Tensor,
    ) -> Tensor:
        """Sum over a chunk's tokens [n] of PPO's loss and of the KL's, where it belongs there."""
        log_ratio = scores.logp - old_logp
        args = self.args
        low, high = args.clip_sides
        losses, clipped = policy_losses(log_ratio, advantages, low, args.dual_clip, high)
        with torch.no_grad():
            ratio = log_ratio.exp()
            seen.append(torch.stack([losses, ratio - 1 - log_ratio, ratio, clipped.float(), scores.logp]).detach())
        if self.penalty.placement != "reward":
            kl_losses = self.penalty.token_losses(
                scores, ref_logp=ref_logp, behaviour_logp=behaviour_logp, weight=kl_weight
            )
            losses = losses + self.ppo.cycle.running.advantage_scale * kl_losses
        return losses.sum()

    def _end_of_minibatch(self) -> None:
        """Put the processes' sums together; stop on a non-finite loss; decide, on all ranks alike, on target_kl."""
        state, stats = self.ppo, self.ppo.cycle.running
        if stats.stopped:
            return
        local = state.take_minibatch_sums()
        gathered = self.accelerator.gather(torch.tensor([list(local.values())], device=self.args.device))
        assert isinstance(gathered, Tensor)
        broken = gathered[:, list(local).index("nonfinite")].nonzero().flatten().tolist()
        if broken:
            where = f"on rank(s) {broken} at step {self.state.global_step}"
            raise RuntimeError(f"the loss is not finite {where}. {self._resume_hint()}")
        sums = dict(zip(local, gathered.double().sum(0).tolist(), strict=True))
        for name, total in sums.items():
            state.loss_sums[name] += total
        if self.args.target_kl is not None and sums["tokens"]:
            stats.stopped = sums["approx_kl"] / sums["tokens"] > self.args.target_kl
            state.early_stops += stats.stopped

    # ---- evaluation, metrics ---------------------------------------------------------------------------------

    def evaluate(
        self,
        eval_dataset: Dataset | dict[str, Dataset] | str | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        """Generate from the evaluation prompts and measure; training draws the same random numbers with and without."""
        with torch.random.fork_rng(devices=[self.args.device] if self.args.device.type == "cuda" else []):
            return super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)  # pyright: ignore

    def prediction_step(
        self, model: nn.Module, inputs: Rows, prediction_loss_only: bool, ignore_keys: list[str] | None = None
    ) -> tuple[None, None, None]:
        """One evaluation batch, with random numbers that depend on the seed and its place alone."""
        gradient_state = self.accelerator.gradient_state
        keep = len(inputs)
        if gradient_state.end_of_dataloader and gradient_state.remainder > 0:
            keep = min(max(gradient_state.remainder - self._data_rank * len(inputs), 0), len(inputs))
        evaluated = self.ppo.evaluation.tables
        torch.manual_seed(self.args.seed + 15_485_863 * (1 + len(evaluated)) + self._data_rank)
        with torch.no_grad():
            _, _, table = self._collector.collect(model, inputs, self.ppo, self.state, learn=False, keep=keep)
        evaluated.append(table)
        return None, None, None

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add klft's metrics to what the Trainer logs. In place: `evaluate` returns the same dictionary."""
        timing = next((key for key in logs if key.endswith("_runtime")), "")
        prefix = timing.removesuffix("_runtime")
        names = reward_names(self.reward_funcs)
        evaluated = self.ppo.evaluation
        if prefix == "train" and self._self_test_seconds:
            logs["self_test/seconds"] = self._self_test_seconds
        if "loss" in logs:
            logs.update(self._train_metrics(names))
        elif prefix and prefix != "train" and evaluated.tables:
            metrics = with_logged(rollout_metrics(Table.join(evaluated.tables), names), evaluated.logged)
            logs.update({f"{prefix}_{name}": value for name, value in metrics.items()})
            self.ppo.evaluation = Pending()
        super().log(logs, start_time)
        if self.args.log_completions and "loss" in logs and self.is_world_process_zero():
            shown = self.args.num_completions_to_print
            show_completions(self.ppo.completions, self.state.global_step, self._output_dir, shown)

    def _train_metrics(self, names: list[str]) -> dict[str, float]:
        state = self.ppo
        tables = state.train.tables
        metrics = loss_metrics(state.loss_sums) | state.phases.take(sum(len(table.tokens) for table in tables))
        if tables:
            metrics |= rollout_metrics(Table.join(tables), names)
            metrics["kl/coef"] = state.coef
        if tables or state.early_stops:  # the stop may come in a later log than the rollout
            metrics["ppo/early_stop"] = state.early_stops / max(len(tables), 1)
        metrics["episode"] = float(state.episodes)
        metrics = with_logged(metrics, state.train.logged)
        state.forget_logged()
        return metrics

    # ---- the Trainer's frame ---------------------------------------------------------------------------------

    def _set_signature_columns_if_needed(self) -> None:
        if self._signature_columns is None:  # every column may be wanted by a reward function
            self._signature_columns = list(self.train_dataset.column_names)  # pyright: ignore

    def get_train_dataloader(self) -> DataLoader:
        """Prompts, as many per batch as a process needs for one rollout, repeated for every micro-batch made of it."""
        if self.train_dataset is None:
            raise ValueError("training needs a train_dataset")
        prompts: Any = self.train_dataset
        options: Any = {"sampler": self._sampler(), "collate_fn": self.data_collator, "drop_last": True}
        loader = DataLoader(prompts, self.args.rollout_batch_size, **options)
        return self.accelerator.prepare(loader)

    def _sampler(self) -> given.RolloutSampler:
        per_rollout = self.args.steps_per_rollout
        return given.rollout_sampler(self.train_dataset, self.args, lambda: self.state.global_step // per_rollout)

    def train(
        self,
        resume_from_checkpoint: str | os.PathLike | bool | None = None,
        trial: object = None,
        ignore_keys_for_eval: list[str] | None = None,
    ) -> "TrainOutput":
        """Train. `resume_from_checkpoint`: a folder, or True for the newest complete checkpoint in output_dir.

        Raises ValueError where output_dir holds another run that is neither resumed nor to be overwritten, SystemExit
        (143) after a SIGTERM: once a checkpoint is saved, at the end of the step (not with save_strategy="no").
        """
        output_dir = self._output_dir
        with (
            reasons_recorded(self._resume_hint),
            ckpt.locked(output_dir, self.accelerator) as self._check_lock,
            ckpt.own_rotation(self.args) as self._save_total_limit,
        ):
            folder = ckpt.resolve_on_all_ranks(output_dir, resume_from_checkpoint, self.accelerator)
            if self._claimed != output_dir:  # a second call goes on in its own
                ckpt.claim(output_dir, folder, self.accelerator, overwrite=self.args.overwrite_output_dir)
                self._claimed, self._run = output_dir, ckpt.run_id(folder)
                rest: Any = self.train_dataset, self.optimizer
                self._known = resume.models_and_data(self._policy, self.penalty, self.reward_funcs, *rest)
            set_seed(self.args.seed + self._data_rank)
            if folder is not None:
                self._load_state(folder)
            else:
                self.ppo.cycle = Cycle(self.args, self._data_rank, self.ppo.episodes)
            if self.args.kl_log_tokens:
                from klft.ppo.tokens import TokenTables

                self.ppo.tokens = TokenTables(self, output_dir)
            with self._sigterm.listening():
                result = super().train(str(folder) if folder else None, trial, ignore_keys_for_eval)  # pyright: ignore
            if self.ppo.tokens:
                self.ppo.tokens.close()
            if self._sigterm.stopped:
                ckpt.logger.warning(f"ended by SIGTERM. {self._resume_hint()}")
                raise SystemExit(143)
            best = self.state.best_model_checkpoint
            if self.args.load_best_model_at_end and best:
                self._load_value_function(Path(best))
            return result

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        if self.state.global_step < self.state.max_steps:  # else a finished run that is resumed: one step too many
            super()._run_epoch(*args, **kwargs)

    def _run_settings(self, step: int) -> dict[str, Any]:
        """Settings that must not change between a checkpoint and the run that continues it."""
        rollout = -(-step // self.args.steps_per_rollout)  # the next one; what is left of the last is in the checkpoint
        upcoming = self._sampler().prompts_of(rollout)[: self.args.rollout_batch_size]  # those of the main process
        rows = [self.train_dataset[i] for i in upcoming]  # pyright: ignore
        return resume.run_settings(self.args, self._known, rows, self._collector.tokenizer)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """The policy alone, as from_pretrained loads it; the value function in a file beside it."""
        super().save_model(output_dir, _internal_call)
        folder = Path(output_dir or self._output_dir)
        if not _internal_call:
            save_gathered(self, folder)
        value_function.save_value_function(self._policy, folder, write=self.args.should_save)

    def push_to_hub(self, *args: object, **kwargs: object) -> Any:
        """Upload model, tokenizer and card; not the tables and pages in output_dir, which hold the texts."""
        with ckpt.hub_folder(self.args):
            return super().push_to_hub(*args, **kwargs)  # pyright: ignore[reportArgumentType]

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        final = self._output_dir / f"checkpoint-{self.state.global_step}"
        self._check_lock()
        writing = ckpt.writing(self, final, self._run, self._save_total_limit)
        with saving(final, self._resume_hint), writing as folder:
            super()._save_checkpoint(model, trial)
            state = self.ppo
            if state.cycle.rollout is not None:
                rank = self.args.process_index
                ckpt.write_rollout(folder, rank, state.cycle.rollout.tensors())
            if self.args.should_save:
                save_reference(folder, self.penalty.reference)
                saved = {
                    "run": self._run_settings(self.state.global_step),
                    "step": self.state.global_step,
                    "controller": self.penalty.state_dict(),
                    "moments": state.moments.state_dict(),
                    "episodes": state.episodes,
                    "cycle": state.cycle.state_dict(),
                }
                ckpt.write_state(folder, saved)

    def _load_state(self, folder: Path) -> None:
        state = ckpt.read_state(folder)
        done, wanted = state["step"], self.args.max_steps
        if 0 < wanted <= done:
            ckpt.logger.warning(f"{folder} is at step {done} of {wanted}: nothing is left to train")
        now = self._run_settings(done)
        changed = resume.check_same_run(folder, state["run"], now, self.args.resume_changes, self.accelerator)
        self._next_prompts = now["next_prompts"]
        if "learning_rate" in changed:
            self.add_callback(resume.ScaleLearningRate(now["learning_rate"] / state["run"]["learning_rate"]))
        load_reference(folder, self.penalty.reference)
        if not changed & {"kl_coef", "kl_controller"}:
            self.penalty.load_state_dict(state["controller"])
        self.ppo.moments.load_state_dict(state["moments"])
        self.ppo.episodes = state["episodes"]
        cycle = self.ppo.cycle = Cycle(self.args, self._data_rank, self.ppo.episodes)
        cycle.load_state_dict(state["cycle"])
        if cycle.position:
            tensors = ckpt.read_rollout(folder, self.args.process_index)
            cycle.rollout = Rollout(**{name: t.to(self.args.device) for name, t in tensors.items()})
        self._load_value_function(folder)

    def _load_value_function(self, folder: Path) -> None:
        if not self.is_deepspeed_enabled or (folder / value_function.VALUE_FILE).exists():
            value_function.load_value_function(self._policy, folder)  # ZeRO-3 has it in its own checkpoint
