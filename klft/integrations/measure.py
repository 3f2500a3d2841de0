"""A trainer's batch under policy and reference: the loss, the scores of its tokens, and what is logged of them."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from klft.fused import fused_token_loss, token_scores
from klft.integrations.backbone import BackboneCall, versions
from klft.integrations.batch import Batch
from klft.masked import scatter_masked
from klft.penalty import KLPenalty, TokenKL
from klft.scores import TokenScores, flat_metrics
from klft.scoring import Predictions, Scorer

if TYPE_CHECKING:
    from accelerate import Accelerator
    from transformers import TrainingArguments

SCORES = ("logp", "ref_logp", "reverse_kl", "forward_kl", "entropy", "ref_entropy")
KEPT_TOKENS = 1 << 20  # of a process between two logs; older ones are forgotten


@dataclass
class PolicySide:
    """One reference, its part in the penalty, and what compares the policy with it."""

    weight: float
    reference: Any
    scorer: Scorer

    @staticmethod
    def of(penalty: KLPenalty, args: "TrainingArguments") -> "list[PolicySide]":
        """A mixture's references, or the only one."""
        parts = getattr(penalty.reference, "parts", None) or [(1.0, penalty.reference)]
        temperature = getattr(args, "temperature", 1.0)
        return [PolicySide(weight, part, Scorer(part, temperature=temperature)) for weight, part in parts]


@dataclass
class Measured:
    """The KL of a batch: N counted tokens in S sequences of at most L of them."""

    token_ids: Int[Tensor, "N"]
    sequence: Int[Tensor, "N"]  # 0 ... S-1
    scores: TokenScores  # [N] each, and top lists [N, k] if they were asked for
    kl: TokenKL  # the same in rows, [S, L] each
    loss: Float[Tensor, ""] | None


def measure(
    penalty: KLPenalty,
    sides: list[PolicySide],
    model: nn.Module,
    call: BackboneCall,
    batch: Batch,
    *,
    with_loss: bool = True,
    top_k: int = 0,
) -> Measured:
    """The KL of the tokens that count, and coef * KL over their divisors where it belongs in the loss.

    With `top_k` both models' likeliest tokens too, which takes a pass of its own.
    Raises RuntimeError where the hidden states are not those of the batch's tokens.
    """
    if call.hidden.shape[:2] != batch.counted.shape:
        raise RuntimeError(
            f"KLAnchorMixin: the backbone gave hidden states {list(call.hidden.shape)} for tokens "
            f"{list(batch.counted.shape)} ({versions()}): virtual tokens, or another layout than this klft knows"
        )
    loss_wanted = with_loss and bool(penalty.coef) and penalty.placement != "reward"
    hidden = call.hidden if loss_wanted else call.hidden.detach()
    head = sides[0].scorer.policy_head(model)
    device, token_ids = head.weight.device, batch.pick(batch.token_ids)
    policy = Predictions(hidden[batch.predicts.to(hidden.device)].to(device), head)
    inputs = []
    for side in sides:
        ref_hidden, ref_head = side.reference.hidden_of(call.inputs)
        reference = Predictions(ref_hidden[batch.predicts.to(ref_hidden.device)], ref_head).on(device)
        inputs.append(side.scorer.fused_inputs(policy, reference, token_ids))
    numbers = torch.unique_consecutive(batch.pick(batch.sequence), return_inverse=True)[1]
    losses, weight = (), None
    scores = None
    if top_k or not loss_wanted or penalty.token_rule is not None:
        with torch.no_grad():
            scores = _mixed(sides, [token_scores(**given, top_k=top_k) for given in inputs])
        ruled = _in_rows(penalty, scores, batch, numbers)
        weight = None if ruled.weight is None else ruled.weight[ruled.mask]
    if loss_wanted:
        losses, each = zip(*(_loss_and_scores(penalty, given, batch, weight) for given in inputs), strict=True)
        scores = scores or _mixed(sides, each)
    assert scores is not None
    kl = _in_rows(penalty, scores, batch, numbers)
    loss = torch.stack([side.weight * t for side, t in zip(sides, losses, strict=True)]).sum() if losses else None
    return Measured(token_ids, numbers, scores, kl, loss)


def _loss_and_scores(
    penalty: KLPenalty, inputs: dict[str, Any], batch: Batch, weight: Float[Tensor, "N"] | None
) -> tuple[Tensor, TokenScores]:
    """(sum over tokens of coef * KL / divisor, differentiable; scores [N] of the same pass)."""
    n, device = len(inputs["token_ids"]), inputs["hidden"].device
    given = {"index": torch.arange(n, device=device), "divisor": batch.pick(batch.divisor).to(device), "weight": weight}
    if batch.behaviour_logp is not None:
        given["behaviour_logp"] = batch.pick(batch.behaviour_logp).to(device)
    constants = {name: t for name, t in given.items() if t is not None}
    dtype = torch.float64 if inputs["hidden"].dtype == torch.float64 else torch.float32
    kept = {name: torch.zeros(n, dtype=dtype, device=device) for name in SCORES}

    def loss_of(scores: Any, *chunks: Tensor) -> Tensor:
        of_chunk = dict(zip(constants, chunks, strict=True))
        index, divisor = of_chunk.pop("index"), of_chunk.pop("divisor")
        for name in SCORES:
            kept[name][index] = getattr(scores, name).detach().to(dtype)
        return (penalty.token_losses(scores, **of_chunk) / divisor).sum()

    return fused_token_loss(loss_of, **inputs, per_token=tuple(constants.values())), TokenScores(**kept)


def _mixed(sides: list[PolicySide], scores: Sequence[TokenScores]) -> TokenScores:
    """Scores under a mixture: the weighted sums of what is the reference's."""
    if len(sides) == 1:
        return scores[0]
    summed = ("ref_logp", "ref_entropy", "reverse_kl", "forward_kl")
    return replace(scores[0], top1_agree=None, ref_top_ids=None, ref_top_p=None, **{
        name: sum(side.weight * getattr(of_side, name) for side, of_side in zip(sides, scores, strict=True))
        for name in summed
    })  # fmt: skip


def _in_rows(penalty: KLPenalty, scores: TokenScores, batch: Batch, numbers: Int[Tensor, "N"]) -> TokenKL:
    """[N] -> [S, L]: a sequence's counted tokens in one row, from its start."""
    lengths = torch.bincount(numbers)
    columns = torch.arange(int(lengths.max()) if len(lengths) else 0, device=numbers.device)
    mask = columns < lengths[:, None]
    behaviour = None if batch.behaviour_logp is None else scatter_masked(batch.pick(batch.behaviour_logp), mask)
    rows = {name: scatter_masked(t, mask) for name, t in scores.items() if name in SCORES}
    token_ids = scatter_masked(batch.pick(batch.token_ids), mask)
    return penalty.measure_scores(TokenScores(**rows), mask, token_ids=token_ids, behaviour_logp=behaviour)


@dataclass
class Measurements:
    """Tokens since the last log, on this process: columns of SCORES and the weight, and their sequences."""

    columns: list[Float[Tensor, "N 7"]] = field(default_factory=list)
    sequences: list[Int[Tensor, "N"]] = field(default_factory=list)
    next_sequence: int = 0

    def add(self, measured: Measured) -> None:
        """The tokens of a batch, on the CPU."""
        kl = measured.kl
        columns = [getattr(kl.scores, name) for name in SCORES] + [kl.weights]
        self.columns.append(torch.stack([t[kl.mask].float() for t in columns], -1).cpu())
        self.sequences.append(measured.sequence.cpu() + self.next_sequence)
        self.next_sequence += len(kl.mask)
        while sum(map(len, self.columns[1:])) > KEPT_TOKENS:
            del self.columns[0], self.sequences[0]

    def take(self, accelerator: "Accelerator", sampled: bool) -> dict[str, float]:
        """The metrics of all processes' tokens; all processes call it together. Forgets the tokens."""
        columns = torch.cat([torch.zeros(0, len(SCORES) + 1), *self.columns])
        sequence = torch.cat([torch.zeros(0, dtype=torch.long), *self.sequences])
        sequence = sequence * accelerator.num_processes + accelerator.process_index
        self.columns, self.sequences, self.next_sequence = [], [], 0
        table = torch.cat([columns.double(), sequence[:, None].double()], 1).to(accelerator.device)
        padded: Any = accelerator.pad_across_processes(table[None], dim=1, pad_index=-1)
        gathered = accelerator.gather(padded).flatten(0, 1).cpu()  # pyright: ignore
        *values, weight, sequence = gathered[gathered[:, -1] >= 0].unbind(-1)
        counts = weight != 0
        if not bool(counts.any()):
            return {}
        scores = TokenScores(**{name: t[counts] for name, t in zip(SCORES, values, strict=True)})
        scores.sampled = torch.full_like(scores.logp, sampled, dtype=torch.bool)
        numbers = torch.unique(sequence[counts], return_inverse=True)[1]
        return flat_metrics(scores, numbers, weight[counts])
