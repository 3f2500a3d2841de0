"""What is logged, and how it is put together: every number is a global sum over a global count.

A `Table` holds what one or more rollouts generated, on all processes: one row per real token and one per completion.
Metrics are computed from the table when the Trainer logs, so percentiles and maxima are those of everything since the
last log. A metric without a token behind it is left out.
"""

from dataclasses import dataclass

import torch
from accelerate import Accelerator
from torch import Tensor

from klft.estimators import k1, k2, k3
from klft.masked import masked_var
from klft.scores import TokenScores

TOKEN_COLUMNS: tuple[str, ...] = (
    "logp", "ref_logp", "reverse_kl", "forward_kl", "entropy", "ref_entropy", "top1_agree", "value", "return", "reward",
)  # fmt: skip


@dataclass
class Table:
    """float64: `tokens` [N, len(TOKEN_COLUMNS)]; `sequences` [B, 4 + K]: score, terminated, length, KL, K scores."""

    tokens: Tensor
    sequences: Tensor

    @staticmethod
    def join(tables: "list[Table]") -> "Table":
        return Table(torch.cat([t.tokens for t in tables]), torch.cat([t.sequences for t in tables]))


def gather_table(
    accelerator: Accelerator,
    scores: TokenScores,
    mask: Tensor,
    per_token: dict[str, Tensor],
    sequence_kl: Tensor,
    totals: Tensor,
    terminated: Tensor,
    by_function: Tensor,
    keep: slice = slice(None),
) -> Table:
    """Bring every process's rows together: two collectives, whatever the completions' lengths."""
    columns = [getattr(scores, name) for name in TOKEN_COLUMNS[:7]] + [per_token[name] for name in TOKEN_COLUMNS[7:]]
    tokens = torch.stack([c.float() for c in columns] + [mask.float()], -1)
    counted = torch.zeros_like(totals)
    counted[keep] = 1.0  # a dataloader repeats samples to fill its last batch: they are not counted twice
    sequences = torch.stack([totals, terminated.float(), mask.sum(-1).float(), sequence_kl, counted], -1)
    sequences = torch.cat([sequences, by_function.to(sequences)], -1)
    everything = accelerator.gather(accelerator.pad_across_processes(tokens, dim=1))
    sequences = accelerator.gather(sequences)
    assert isinstance(everything, Tensor)
    assert isinstance(sequences, Tensor)
    real = sequences[:, 4] > 0
    tokens = everything[real][everything[real][..., -1] > 0][:, :-1]
    return Table(tokens.double().cpu(), sequences[real][:, [0, 1, 2, 3, *range(5, sequences.shape[1])]].double().cpu())


def rollout_metrics(table: Table, names: list[str]) -> dict[str, float]:
    """The metrics of what was generated. `names` are the reward functions'."""
    metrics: dict[str, float] = {}
    column = dict(zip(TOKEN_COLUMNS, table.tokens.unbind(-1), strict=True))
    if len(table.tokens):
        metrics |= _kl_metrics(column)
        metrics["entropy/policy/mean"] = column["entropy"].mean().item()
        metrics["entropy/reference/mean"] = column["ref_entropy"].mean().item()
        metrics["reward/total/mean"] = column["reward"].sum().item() / len(table.sequences)
        everything = torch.ones_like(column["return"], dtype=torch.bool)
        spread = masked_var(column["return"], everything)
        if spread > 0:
            unexplained = masked_var(column["return"] - column["value"], everything)
            metrics["value/explained_variance"] = (1 - unexplained / spread).item()
    if len(table.sequences):
        score, terminated, length, sequence_kl = table.sequences[:, :4].unbind(-1)
        finite = sequence_kl.isfinite()
        if finite.any():
            metrics["kl/sequence/mean"] = sequence_kl[finite].mean().item()
        metrics["reward/score/mean"] = score.mean().item()
        metrics["reward/score/std"] = score.std(correction=0).item()
        metrics["completions/mean_length"] = length.mean().item()
        metrics["completions/terminated/frac"] = terminated.mean().item()
        for i, name in enumerate(names):
            applies = table.sequences[:, 4 + i]
            applies = applies[~applies.isnan()]
            if len(applies):
                metrics[f"reward/{name}/mean"] = applies.mean().item()
    return metrics


def means(logged: dict[str, list[float]]) -> dict[str, float]:
    """The mean of each list."""
    return {name: sum(values) / len(values) for name, values in logged.items() if values}


def _kl_metrics(column: dict[str, Tensor]) -> dict[str, float]:
    metrics: dict[str, float] = {}
    nonfinite = torch.zeros(len(column["logp"]), dtype=torch.bool)
    for direction in ("reverse", "forward"):
        kl = column[f"{direction}_kl"]
        nonfinite |= ~kl.isfinite()
        kl = kl[kl.isfinite()]
        if len(kl):
            metrics[f"kl/{direction}/mean"] = kl.mean().item()
            metrics[f"kl/{direction}/max"] = kl.max().item()
            # torch.quantile refuses more than 2^24 elements
            ordered = kl.sort().values
            for percent in (50, 90, 99):
                metrics[f"kl/{direction}/p{percent}"] = ordered[round((len(kl) - 1) * percent / 100)].item()
    for name, estimator in (("k1", k1), ("k2", k2), ("k3", k3)):
        estimate = estimator(column["logp"], column["ref_logp"])
        nonfinite |= ~estimate.isfinite()
        if estimate.isfinite().any():
            metrics[f"kl/{name}/mean"] = estimate[estimate.isfinite()].mean().item()
    metrics["kl/top1_agree/frac"] = column["top1_agree"].mean().item()
    metrics["kl/nonfinite/count"] = float(nonfinite.sum())
    return metrics


LOSS_SUMS: tuple[str, ...] = (
    "policy_loss", "value_loss", "approx_kl", "ratio", "ratio_clipped", "value_clipped", "tokens", "nonfinite",
)  # fmt: skip


def loss_metrics(sums: dict[str, float]) -> dict[str, float]:
    """The metrics of the optimisation from sums over tokens and the number of tokens."""
    if not sums.get("tokens"):
        return {}
    last_word = {"ratio_clipped": "frac", "value_clipped": "frac"}
    return {f"ppo/{name}/{last_word.get(name, 'mean')}": sums[name] / sums["tokens"] for name in LOSS_SUMS[:6]}
