"""Metrics of PPO: every number is a global sum over a global count.

A `Table` holds what one or more rollouts generated, on all processes: one row per real token and one per completion.
Metrics are computed from the table when the Trainer logs, so percentiles and maxima are those of everything since the
last log. A metric without a token behind it is left out.
"""

from dataclasses import dataclass

import torch
from accelerate import Accelerator
from torch import Tensor

from klft.masked import masked_var
from klft.penalty import TokenKL
from klft.scores import TokenScores, flat_metrics
from klft.writing import two_digits

SCORES: tuple[str, ...] = (
    "logp", "ref_logp", "reverse_kl", "forward_kl", "entropy", "ref_entropy", "top1_agree",
)  # fmt: skip
TOKEN_COLUMNS: tuple[str, ...] = (*SCORES, "weight", "value", "return", "reward")


@dataclass
class Table:
    """fp64: `tokens` [N, len(TOKEN_COLUMNS)]; `sequences` [B, 3 + K]: score, terminated, length, K reward functions'
    scores, NaN where there is none; `sequence` [N]: which of the sequences a token belongs to."""

    tokens: Tensor
    sequences: Tensor
    sequence: Tensor

    @staticmethod
    def join(tables: "list[Table]") -> "Table":
        """One table of several rollouts."""
        counts = torch.tensor([0, *(len(t.sequences) for t in tables)]).cumsum(0).tolist()
        return Table(
            torch.cat([t.tokens for t in tables]),
            torch.cat([t.sequences for t in tables]),
            torch.cat([t.sequence + first for t, first in zip(tables, counts, strict=False)]),
        )


def gather_table(
    accelerator: Accelerator,
    kl: TokenKL,
    per_token: dict[str, Tensor],
    scores: Tensor,
    terminated: Tensor,
    by_function: Tensor,
    keep: slice = slice(None),
) -> Table:
    """Bring every process's rows together: two collectives, whatever the completions' lengths."""
    columns = dict(kl.scores.items()) | per_token | {"weight": kl.weights}
    tokens = torch.stack([columns[name].float() for name in TOKEN_COLUMNS] + [kl.mask.float()], -1)
    counted = torch.zeros_like(scores)
    counted[keep] = 1.0  # a dataloader repeats samples to fill its last batch: they are not counted twice
    sequences = torch.stack([scores, terminated.float(), kl.mask.sum(-1).float(), counted], -1)
    sequences = torch.cat([sequences, by_function.to(sequences)], -1)
    tokens = accelerator.gather(accelerator.pad_across_processes(tokens, dim=1))
    sequences = accelerator.gather(sequences)
    assert isinstance(tokens, Tensor)
    assert isinstance(sequences, Tensor)
    real = sequences[:, 3] > 0
    tokens, sequences = tokens[real], sequences[real]
    mask = tokens[..., -1] > 0
    sequence = mask.nonzero()[:, 0]
    kept = [0, 1, 2, *range(4, sequences.shape[1])]
    return Table(tokens[mask][:, :-1].double().cpu(), sequences[:, kept].double().cpu(), sequence.cpu())


def rollout_metrics(table: Table, names: list[str]) -> dict[str, float]:
    """The metrics of what was generated. `names` are the reward functions'."""
    metrics: dict[str, float] = {}
    column = dict(zip(TOKEN_COLUMNS, table.tokens.unbind(-1), strict=True))
    if len(table.tokens):
        scores = {name: column[name] for name in SCORES} | {"top1_agree": column["top1_agree"] > 0}
        counts = column["weight"] != 0
        flat = TokenScores(**{name: t[counts] for name, t in scores.items()})
        metrics |= flat_metrics(flat, table.sequence[counts], column["weight"][counts])
        metrics["reward/total/mean"] = column["reward"].sum().item() / len(table.sequences)
        all_tokens = torch.ones_like(column["return"], dtype=torch.bool)
        variance = masked_var(column["return"], all_tokens)
        if variance > 0:
            unexplained = masked_var(column["return"] - column["value"], all_tokens)
            metrics["value/explained_variance"] = (1 - unexplained / variance).item()
    if len(table.sequences):
        score, terminated, length = table.sequences[:, :3].unbind(-1)
        score = score[~score.isnan()]  # of what any function judged
        if len(score):
            metrics["reward/score/mean"] = score.mean().item()
            metrics["reward/score/std"] = score.std(correction=0).item()
        metrics["completions/mean_length"] = length.mean().item()
        metrics["completions/terminated/frac"] = terminated.mean().item()
        for i, name in enumerate(names):
            applies = table.sequences[:, 3 + i]
            applies = applies[~applies.isnan()]
            if len(applies):
                metrics[f"reward/{name}/mean"] = applies.mean().item()
    return metrics


def why_nothing_to_learn(sequences: Tensor, names: list[str], coef: float) -> str | None:
    """Why the scores in a Table's sequences [B, 3 + K] tell no completion from another, or those of one function."""
    score, _, _, *by_function = (column[~column.isnan()] for column in sequences.unbind(-1))
    nothing = "there is nothing to learn from" + (" but the KL penalty" if coef else "")
    if len(sequences) > 1 and not len(score):
        return f"no completion of this rollout has a score, by any reward function: {nothing}"
    if len(score) > 1 and score.min() == score.max() and (len(score) == len(sequences) or score[0] == 0):
        return f"every completion of this rollout has the same score ({two_digits(score[0].item())}): {nothing}"
    for name, given in zip(names, by_function, strict=True):
        if len(given) > 1 and given.min() == given.max():
            same = f"the same score ({two_digits(given[0].item())})"
            return f"reward function {name!r} gave every completion of this rollout that it judged {same}"
    return None


def with_logged(metrics: dict[str, float], logged: dict[str, list[float]]) -> dict[str, float]:
    """The metrics, and the mean of what reward functions logged: as logged/<name> where klft has the name itself."""
    means = {name: sum(values) / len(values) for name, values in logged.items() if values}
    return metrics | {f"logged/{name}" if name in metrics else name: value for name, value in means.items()}


LOSS_SUMS: tuple[str, ...] = (
    "policy_loss", "value_loss", "approx_kl", "ratio", "ratio_clipped", "value_clipped", "tokens", "nonfinite",
)  # fmt: skip


def loss_metrics(sums: dict[str, float]) -> dict[str, float]:
    """The metrics of the optimisation from sums over tokens and the number of tokens."""
    if not sums.get("tokens"):
        return {}
    last_word = {"ratio_clipped": "frac", "value_clipped": "frac"}
    return {f"ppo/{name}/{last_word.get(name, 'mean')}": sums[name] / sums["tokens"] for name in LOSS_SUMS[:6]}
