"""PPOTrainer: rollouts, rewards, the PPO loss and its KL penalty, on the frame of transformers.Trainer.

The dataloader yields prompts; `training_step` makes a rollout when the last one is used up and otherwise takes the next
micro-batch from it, so one optimizer step of the Trainer is one PPO minibatch: clipping, schedule, logging, saving,
resuming and evaluation are the Trainer's. Absent on purpose: a loop of our own, a wrapper around the model.
"""

from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerCallback, set_seed

from klft.fused import fused_token_loss
from klft.generation import generate
from klft.masked import masked_sum, masked_var, masked_whiten, spread
from klft.models import disable_dropout, vocab_size
from klft.penalty import KLPenalty, TokenKL
from klft.ppo import checkpoint as ckpt
from klft.ppo import value as value_function
from klft.ppo.completions import completion_rows, show_completions
from klft.ppo.config import PPOConfig
from klft.ppo.cycle import Cycle
from klft.ppo.guards import StopOnNonFiniteGradient, check_finite, on_all_ranks
from klft.ppo.inputs import RolloutSampler, equip, load_policy, load_tokenizer, prompts_of_both
from klft.ppo.losses import gae, policy_losses, value_losses
from klft.ppo.metrics import LOSS_SUMS, Table, gather_table, loss_metrics, means, rollout_metrics
from klft.ppo.rewards import as_reward_functions, call_reward_functions, reward_name, reward_weights
from klft.ppo.rollout import Batch, Rollout, Scorer
from klft.prompts import eos_ids, pad_id_of, spoken, tokenize_prompts
from klft.scores import TokenScores
from klft.shaping import RunningMoments, finish_scores, shape_rewards, weigh_scores


def _as_list(rows: list) -> Any:
    return rows


class PPOTrainer(Trainer):
    """Train a causal LM by PPO on reward minus a KL penalty against a frozen reference.

    Args:
        model: a causal LM, a PEFT model, or a model id.
        reward_funcs: one or several of: a callable (TRL GRPO's signature), a sequence-classification model or its id.
        train_dataset: a `datasets.Dataset` with a `prompt` column, text or messages; the other columns go to the
            reward functions.
        reference: a model or a klft reference. Default: the adapter switched off (PEFT), else a frozen copy.
        value_model: a causal sequence-classification model with one output. Default: a linear head on the policy.

    Raises ValueError / TypeError for inputs that cannot work, before anything is trained.
    """

    loss_is_scaled_for_ga = True

    def __init__(
        self,
        model: Any,
        reward_funcs: Any,
        args: PPOConfig | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        reference: Any = None,
        value_model: Any = None,
        peft_config: Any = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple = (None, None),
    ):
        args = args or PPOConfig(output_dir="ppo_output")
        if not isinstance(args, PPOConfig):
            raise TypeError(f"args must be a klft.PPOConfig, got {type(args).__name__}")
        set_seed(args.seed)  # before an adapter is drawn: the Trainer seeds only once it has the model
        model = load_policy(model)
        tokenizer = load_tokenizer(processing_class, model)
        self.reward_funcs = as_reward_functions(reward_funcs)
        self._weights = reward_weights(args.reward_weights, len(self.reward_funcs))
        train_dataset, eval_dataset = prompts_of_both(train_dataset, eval_dataset, args.episodes_per_rollout)
        model, reference = equip(model, reference, value_model, peft_config, tokenizer)
        if args.disable_dropout:
            disable_dropout(model)
        self.penalty = KLPenalty(
            reference,
            direction=args.kl_direction,
            estimator=args.kl_estimator,
            # "exact" means its loss and its reward together; alone in the reward it would be wrong.
            placement="both" if (args.kl_estimator, args.kl_placement) == ("exact", "reward") else args.kl_placement,
            controller=args.controller(),
        )
        shared = min(vocab_size(model), vocab_size(reference.model))
        self.scorer = Scorer(reference, args.temperature, shared, args.kl_shard_vocab)
        self.scorer.head(model)  # a head that cannot be split into tiles is refused before anything is trained
        # The adapter's own file holds the value function only if PEFT was told so when the adapter was made.
        self._value_apart = hasattr(model, "peft_config") and (peft_config is None or value_model is not None)
        super().__init__(
            model=model,
            args=args,
            data_collator=_as_list,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=tokenizer,
            callbacks=callbacks,
            optimizers=optimizers,
        )
        self.args: PPOConfig
        self.add_callback(StopOnNonFiniteGradient(self, lambda: ckpt.way_back(self._output_dir)))
        if hasattr(model, "warnings_issued"):
            model.warnings_issued["estimate_tokens"] = True  # batches are prompts: there are no input_ids to count
        for carrier in (reference, *self.reward_funcs):
            if isinstance(getattr(carrier, "model", None), nn.Module):
                carrier.model.to(self.args.device)
        self._start_counting()

    def _start_counting(self) -> None:
        self.episodes = 0
        self._cycle = Cycle(self.args, self._data_rank, self.episodes)
        self._moments = RunningMoments()
        self._coef = self.penalty.coef  # of the last rollout
        self._train_tables: list[Table] = []
        self._eval_tables: list[Table] = []
        self._window_sums = dict.fromkeys(LOSS_SUMS, 0.0)  # of this minibatch, on this process
        self._loss_sums = dict.fromkeys(LOSS_SUMS, 0.0)  # since the last log, on all
        self._early_stops = 0.0
        self._extra: dict[str, list[float]] = {}  # what reward functions logged themselves, by name
        self._eval_extra: dict[str, list[float]] = {}
        self._completions: list[dict] = []
        self._tokens: Any = None

    # ---- the generation cycle --------------------------------------------------------------------------------

    def _reduce(self, t: Tensor) -> Tensor:
        reduced = self.accelerator.reduce(t, "sum")
        assert isinstance(reduced, Tensor)
        return reduced

    @property
    def _policy(self) -> nn.Module:
        assert self.model is not None
        return self.model

    @property
    def _output_dir(self) -> Path:
        return Path(self.args.output_dir or ".")

    @property
    def _data_rank(self) -> int:
        # Processes that share one sample (tensor parallel) must draw the same random numbers.
        return self.args.process_index // self.get_tp_size()

    def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        """One micro-batch. Makes the next rollout first if the last one is used up."""
        cycle = self._cycle
        if cycle.rollout is None:
            self._make_rollout(model, inputs)
        micro, tokens = cycle.next_micro_batch()
        if cycle.facts["stopped"]:
            loss = torch.zeros((), device=self.args.device)  # no backward: without gradients the step changes nothing
        else:
            loss = super().training_step(model, {"rollout": micro, "tokens": tokens})  # pyright: ignore
        if cycle.position % self.args.gradient_accumulation_steps == 0:
            self._end_of_minibatch()
        if cycle.used_up:
            self.penalty.controller.update(*cycle.facts["observed"])
            self._cycle = Cycle(self.args, self._data_rank, self.episodes)
        return loss

    # ---- rollout -----------------------------------------------------------------------------------------------

    def _generate(self, rows: list[dict]) -> tuple[Batch, Tensor, list]:
        """(tokens, terminated, completions as the reward functions see them)."""
        tokenizer: Any = self.processing_class
        ends, pad_id = eos_ids(self.model, tokenizer), pad_id_of(tokenizer)
        prompts = [row["prompt"] for row in rows]
        ids, mask = tokenize_prompts(tokenizer, prompts, self.args.max_prompt_length, pad_id)
        unwrapped = self.accelerator.unwrap_model(self.model_wrapped)
        config = self.args.generation_config(ends, pad_id)
        device = self.args.device
        batch, terminated = generate(
            unwrapped, ids.to(device), mask.to(device), ends, pad_id, config, self.scorer.vocab_size
        )
        return batch, terminated, spoken(tokenizer, prompts, batch)

    def _scores_by_function(self, rows: list[dict], batch: Batch, completions: list, learn: bool) -> Tensor:
        """Raw scores [B, K] of the reward functions; an error on one rank ends all ranks with it."""
        columns = {name: [row[name] for row in rows] for name in rows[0] if name != "prompt"}
        ids = [row[m].tolist() for row, m in zip(batch.completion_ids, batch.mask, strict=True)]
        self._table_extra: dict[str, list] = {}
        extra: dict[str, list[float]] = {}

        def work() -> Tensor:
            return call_reward_functions(
                self.reward_funcs,
                [row["prompt"] for row in rows],
                completions,
                ids,
                columns,
                trainer_state=self.state,
                log_metric=lambda name, value: extra.setdefault(name, []).append(float(value)),
                log_extra=lambda name, values: self._table_extra.update({name: list(values)}),
            )

        scores = on_all_ranks(self.accelerator, work)
        store = self._extra if learn else self._eval_extra
        for logged in gather_object([extra]):
            for name, values in logged.items():
                store.setdefault(name, []).extend(values)
        return scores.to(self.args.device)

    def _rollout_of(
        self, model: nn.Module, rows: list[dict], *, learn: bool, keep: slice = slice(None)
    ) -> tuple[Rollout, Table, dict]:
        """Generate, score, shape; what training and evaluation share. (rollout before whitening, table, facts)."""
        args = self.args
        batch, terminated, completions = on_all_ranks(self.accelerator, lambda: self._generate(rows))
        unwrapped = self.accelerator.unwrap_model(model)
        tables = self._tokens if learn and self._tokens and self._tokens.due(self.state.global_step) else None
        with self.accelerator.autocast():  # as the loss will score them again
            size, top_k = args.per_device_train_batch_size, min(tables.top_k, self.scorer.vocab_size) if tables else 0
            scores, values, last = self.scorer.score(model, unwrapped, batch, size, top_k)
        mask = batch.mask
        on_all_ranks(self.accelerator, lambda: check_finite(scores.logp, mask, args.process_index))
        by_function = self._scores_by_function(rows, batch, completions, learn)
        totals = weigh_scores(by_function, self._weights.to(by_function))
        if args.normalize_scores:
            if learn:
                self._moments.learn(totals, self._reduce)
            totals = self._moments.normalise(totals)
        totals = finish_scores(totals, terminated, clip=args.reward_clip, missing_eos_penalty=args.missing_eos_penalty)
        kl = TokenKL(scores, mask)
        penalty = on_all_ranks(self.accelerator, lambda: self.penalty.reward_kl(kl))
        rewards = shape_rewards(totals, penalty, mask, coef=self.penalty.coef)
        if args.whiten_rewards:
            rewards = masked_whiten(rewards, mask, self._reduce, shift_mean=False)
        values = torch.where(mask, values, 0.0)
        last = torch.where(terminated, 0.0, last) if args.bootstrap_truncated else torch.zeros_like(last)
        advantages = gae(rewards, values, mask, gamma=args.gamma, lam=args.lam, last_value=last)
        if tables:
            tables.add(self.state.global_step + 1, batch, scores, rewards, advantages)
        exact = scores.reverse_kl if args.kl_direction == "reverse" else scores.forward_kl
        assert exact is not None
        sequence_kl = torch.where(mask, exact, 0.0).sum(-1)
        table = gather_table(
            self.accelerator, scores, mask,
            {"value": values, "return": advantages + values, "reward": rewards},
            sequence_kl, totals, terminated, by_function, keep,
        )  # fmt: skip
        finite = table.sequences[:, 3].isfinite()
        facts = {
            "coef": self.penalty.coef,
            "observed": [table.sequences[finite, 3].mean().item() if finite.any() else 0.0, int(finite.sum())],
        }
        if args.log_completions and learn:
            self._completions = gather_object(
                completion_rows(rows, completions, totals, sequence_kl, self._table_extra)
            )
        old = torch.where(mask, scores.logp, 0.0), torch.where(mask, scores.ref_logp, 0.0)  # pyright: ignore
        tensors = {f: getattr(batch, f) for f in ("prompt_ids", "prompt_mask", "completion_ids", "mask")}
        return Rollout(**tensors, old_logp=old[0], ref_logp=old[1], values=values, advantages=advantages,
                       returns=advantages + values), table, facts  # fmt: skip

    def _make_rollout(self, model: nn.Module, rows: list[dict]) -> None:
        rollout, table, facts = self._rollout_of(model, rows, learn=True)
        variance = masked_var(rollout.advantages, rollout.mask, self._reduce)
        rollout.advantages = masked_whiten(rollout.advantages, rollout.mask, self._reduce)
        # Whitening divides the reward's gradient by this; a KL in the loss must be divided alike, or `coef` would mean
        # something else there than in the reward.
        facts["scale"] = torch.rsqrt(variance + 1e-8).item()
        self._cycle.start(rollout, facts, self._reduce)
        self._coef = facts["coef"]
        self._train_tables.append(table)
        self.episodes += len(table.sequences)

    # ---- loss --------------------------------------------------------------------------------------------------

    def compute_loss(
        self, model: nn.Module, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Policy + value + KL loss of one micro-batch, divided by its whole minibatch's tokens on all processes."""
        micro: Rollout = inputs["rollout"]
        mask, args = micro.mask, self.args
        hidden, values, _ = self.scorer.forward(model, self.accelerator.unwrap_model(model), micro)
        value, value_clipped = value_losses(values, micro.values, micro.returns, args.cliprange_value)
        seen: list[Tensor] = []
        exact = self.penalty.placement != "reward" and self.penalty.estimator == "exact"
        policy = fused_token_loss(
            lambda scores, *rest: self._policy_loss(seen, scores, *rest),
            **self.scorer.inputs(model, hidden, micro, reference=exact),
            per_token=[t[mask] for t in (micro.old_logp, micro.ref_logp, micro.advantages)],
        )
        # Processes' gradients are averaged, so each contributes its sum times their number.
        processes = args.world_size // self.get_tp_size()
        loss = (policy + args.vf_coef * masked_sum(value, mask)) * processes / max(inputs["tokens"], 1.0)
        of_tokens = torch.cat(seen, 1) if seen else hidden.new_zeros(5, 0)
        of_values = torch.stack([masked_sum(value.detach(), mask), masked_sum(value_clipped.float(), mask)])
        names = ("policy_loss", "approx_kl", "ratio", "ratio_clipped", "value_loss", "value_clipped")
        sums = dict(zip(names, torch.cat([of_tokens[:-1].sum(1), of_values]).tolist(), strict=True))
        sums |= {"tokens": float(mask.sum()), "nonfinite": float(not bool(loss.isfinite()))}
        for name in LOSS_SUMS:
            self._window_sums[name] += sums[name]
        return (loss, {"logp": spread(of_tokens[-1], mask)}) if return_outputs else loss

    def _policy_loss(
        self, seen: list[Tensor], scores: Any, old_logp: Tensor, ref_logp: Tensor, advantages: Tensor
    ) -> Tensor:
        """Sum over a chunk's tokens [n] of PPO's loss and of the KL's, where it belongs there."""
        log_ratio = scores.logp - old_logp
        losses, clipped = policy_losses(log_ratio, advantages, self.args.cliprange, self.args.dual_clip)
        with torch.no_grad():
            ratio = log_ratio.exp()
            seen.append(torch.stack([losses, ratio - 1 - log_ratio, ratio, clipped.float(), scores.logp]).detach())
        if self.penalty.placement != "reward":
            kl = TokenScores(logp=scores.logp[None], ref_logp=ref_logp[None])
            if self.penalty.estimator == "exact":
                name = f"{self.penalty.direction}_kl"
                setattr(kl, name, getattr(scores, name)[None])
            counts = torch.ones_like(old_logp[None], dtype=torch.bool)
            kl_losses = self.penalty.losses(TokenKL(kl, counts, behaviour_logp=old_logp[None]))
            losses = losses + self._cycle.facts["scale"] * kl_losses[0]
        return losses.sum()

    def _end_of_minibatch(self) -> None:
        """Put the processes' sums together; stop on a non-finite loss; decide, on all ranks alike, on target_kl."""
        if self._cycle.facts["stopped"]:
            return
        mine, self._window_sums = self._window_sums, dict.fromkeys(LOSS_SUMS, 0.0)
        everyone = self.accelerator.gather(torch.tensor([list(mine.values())], device=self.args.device))
        assert isinstance(everyone, Tensor)
        broken = everyone[:, -1].nonzero().flatten().tolist()
        if broken:
            where = f"on rank(s) {broken} at step {self.state.global_step}"
            raise RuntimeError(f"the loss is not finite {where}. {ckpt.way_back(self._output_dir)}")
        sums = dict(zip(LOSS_SUMS, everyone.double().sum(0).tolist(), strict=True))
        for name, total in sums.items():
            self._loss_sums[name] += total
        if self.args.target_kl is not None and sums["tokens"]:
            self._cycle.facts["stopped"] = sums["approx_kl"] / sums["tokens"] > self.args.target_kl
            self._early_stops += float(self._cycle.facts["stopped"])

    # ---- evaluation, metrics ---------------------------------------------------------------------------------

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Generate from the evaluation prompts and measure; training draws the same random numbers with and without."""
        with torch.random.fork_rng(devices=[self.args.device] if self.args.device.type == "cuda" else []):
            return super().evaluate(*args, **kwargs)

    def prediction_step(
        self, model: nn.Module, inputs: Any, prediction_loss_only: bool, ignore_keys: list[str] | None = None
    ) -> tuple[None, None, None]:
        """One evaluation batch, with random numbers that depend on the seed and its place alone."""
        gradient_state = self.accelerator.gradient_state
        keep = len(inputs)
        if gradient_state.end_of_dataloader and gradient_state.remainder > 0:
            keep = min(max(gradient_state.remainder - self.args.process_index * len(inputs), 0), len(inputs))
        torch.manual_seed(self.args.seed + 15_485_863 * (1 + len(self._eval_tables)) + self._data_rank)
        with torch.no_grad():
            _, table, _ = self._rollout_of(model, inputs, learn=False, keep=slice(keep))
        self._eval_tables.append(table)
        return None, None, None

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add klft's metrics to what the Trainer logs. In place: `evaluate` returns the same dictionary."""
        timing = next((key for key in logs if key.endswith("_runtime")), "")
        prefix = timing.removesuffix("_runtime")
        names = [reward_name(f) for f in self.reward_funcs]
        if "loss" in logs:
            logs.update(self._train_metrics(names))
        elif prefix and prefix != "train" and self._eval_tables:
            metrics = rollout_metrics(Table.join(self._eval_tables), names) | means(self._eval_extra)
            logs.update({f"{prefix}_{name}": value for name, value in metrics.items()})
            self._eval_tables, self._eval_extra = [], {}
        super().log(logs, start_time)
        if self.args.log_completions and "loss" in logs and self.is_world_process_zero():
            rows, shown = self._completions, self.args.num_completions_to_print
            show_completions(rows, self.state.global_step, self._output_dir, shown)

    def _train_metrics(self, names: list[str]) -> dict[str, float]:
        metrics = loss_metrics(self._loss_sums)
        if self._train_tables:
            metrics |= rollout_metrics(Table.join(self._train_tables), names)
            metrics["kl/coef"] = self._coef
        if self._train_tables or self._early_stops:  # the stop may come in a later log than the rollout
            metrics["ppo/early_stop"] = self._early_stops / max(len(self._train_tables), 1)
        metrics |= means(self._extra)
        metrics["episode"] = float(self.episodes)
        self._train_tables, self._extra, self._early_stops = [], {}, 0.0
        self._loss_sums = dict.fromkeys(LOSS_SUMS, 0.0)
        return metrics

    # ---- the Trainer's frame ---------------------------------------------------------------------------------

    def _set_signature_columns_if_needed(self) -> None:
        if self._signature_columns is None:  # every column may be wanted by a reward function
            self._signature_columns = list(self.train_dataset.column_names)  # pyright: ignore

    def get_train_dataloader(self) -> DataLoader:
        """Prompts, as many per batch as a process needs for one rollout, repeated for every micro-batch made of it."""
        if self.train_dataset is None:
            raise ValueError("training needs a train_dataset")
        sampler = RolloutSampler(
            size=len(self.train_dataset),  # pyright: ignore
            per_rollout=self.args.episodes_per_rollout,
            repeats=self.args.micro_batches_per_rollout,
            seed=self.args.seed if self.args.data_seed is None else self.args.data_seed,
            shuffle=self.args.train_sampling_strategy != "sequential",
        )
        loader = DataLoader(
            self.train_dataset,  # pyright: ignore
            batch_size=self.args.rollout_batch_size,
            sampler=sampler,
            collate_fn=self.data_collator,
            drop_last=True,
        )
        return self.accelerator.prepare(loader)

    def train(
        self, resume_from_checkpoint: str | bool | None = None, trial: Any = None, ignore_keys_for_eval: Any = None
    ) -> Any:
        """Train. `resume_from_checkpoint`: a folder, or True for the newest complete checkpoint in output_dir."""
        output_dir = self._output_dir
        with ckpt.locked(output_dir, self.accelerator):
            folder = ckpt.choose(output_dir, resume_from_checkpoint)
            set_seed(self.args.seed + self._data_rank)
            if folder is not None:
                self._load_state(folder)
            else:
                self._cycle = Cycle(self.args, self._data_rank, self.episodes)
            if self.args.kl_log_tokens:
                from klft.ppo.tokens import TokenTables

                self._tokens = TokenTables(self, output_dir)
            result = super().train(str(folder) if folder else None, trial, ignore_keys_for_eval)
            if self._tokens:
                self._tokens.close()
            best = self.state.best_model_checkpoint
            if self.args.load_best_model_at_end and best:
                self._load_value_function(Path(best))
            return result

    def _run_facts(self) -> dict[str, Any]:
        """What must not change between a checkpoint and the run that continues it."""
        structure = ["world_size", "per_device_train_batch_size", "gradient_accumulation_steps", "seed", "data_seed"]
        facts = {name: getattr(self.args, name) for name in [*structure, *self.args.resumed_fields()]}
        facts["reward_funcs"] = [reward_name(f) for f in self.reward_funcs]
        return facts | {"prompts": len(self.train_dataset or ())}  # pyright: ignore

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """The policy as from_pretrained loads it; the value function rides along, or lies beside it as safetensors."""
        super().save_model(output_dir, _internal_call)
        if self._value_apart and self.args.should_save:
            tensors = value_function.value_parameters(self._policy)
            save_file(tensors, Path(output_dir or self._output_dir) / ckpt.VALUE_FILE)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        final = self._output_dir / f"checkpoint-{self.state.global_step}"
        with ckpt.writing(self, final) as folder:
            super()._save_checkpoint(model, trial)
            if self._cycle.rollout is not None:
                rank = self.args.process_index
                save_file(self._cycle.rollout.tensors(), folder / f"klft_rollout_{rank}.safetensors")
            if self.args.should_save:
                state = {
                    "run": self._run_facts(),
                    "step": self.state.global_step,
                    "controller": self.penalty.state_dict(),
                    "moments": self._moments.state_dict(),
                    "episodes": self.episodes,
                    "cycle": self._cycle.state_dict(),
                }
                ckpt.write_state(folder, state)

    def _load_state(self, folder: Path) -> None:
        state = ckpt.read_state(folder)
        done, wanted = state["step"], self.args.max_steps
        if 0 < wanted <= done:
            raise ValueError(f"{folder} is at step {done} of max_steps={wanted}: there is nothing left to train")
        changed = ckpt.differences(state["run"], self._run_facts())
        if changed:
            raise ValueError(
                f"{folder} was written by another run: {'; '.join(changed)}. Put these back to resume, or start anew "
                "in another output_dir."
            )
        self.penalty.load_state_dict(state["controller"])
        self._moments.load_state_dict(state["moments"])
        self.episodes = state["episodes"]
        self._cycle = Cycle(self.args, self._data_rank, self.episodes)
        self._cycle.load_state_dict(state["cycle"])
        if self._cycle.position:
            tensors = load_file(folder / f"klft_rollout_{self.args.process_index}.safetensors")
            self._cycle.rollout = Rollout(**{name: t.to(self.args.device) for name, t in tensors.items()})
        self._load_value_function(folder)

    def _load_value_function(self, folder: Path) -> None:
        if (folder / ckpt.VALUE_FILE).exists():
            value_function.load_value_parameters(self._policy, load_file(folder / ckpt.VALUE_FILE))
