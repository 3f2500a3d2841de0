"""A reference of which the log-probabilities of k tokens per position are known: from a served model, or a file.

reference = TopKReference.from_vllm([r.prompt_logprobs for r in outputs], input_ids, attention_mask, k=20)
penalty = KLPenalty(reference, estimator="exact", placement="loss")      # later batches: penalty.reference = ...
kl = penalty.measure(logits, input_ids, attention_mask, mask)            # or, without logits:
kl = penalty.measure_scores(reference.score_hidden(hidden, head, input_ids, mask), mask)
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from klft.divergences import upcast
from klft.estimators import support_kl
from klft.fused import token_scores
from klft.heads import LMHead
from klft.masked import check_ids, scatter_masked, token_logps
from klft.references.protocol import Reference
from klft.scores import TokenScores
from klft.writing import one_line

CHUNK = 128  # tokens whose rows of the head are gathered at a time


@runtime_checkable
class HasLogprob(Protocol):
    """vllm.logprobs.Logprob, or its like."""

    logprob: float


Ids2Numbers = Callable[[Tensor], Tensor]
PromptLogprobs = Sequence[Sequence[Mapping[int, HasLogprob] | None]]


class TopKReference(Reference):
    """Log-probabilities of one batch's tokens under the reference: unbiased KLs from k tokens per position.

    KL(p||q) is estimated as the exact terms of the k tokens plus, where the token y that is there is none of them, its
    term over the probability mu(y) with which it was sampled; KL(q||p) likewise. Both are unbiased in value and
    gradient (top_k_kl's estimate, on the reference's k tokens). mu is the policy's own probability, unless
    `behaviour_logp` gives another's: the policy's that sampled, or `sampled_logp` where the reference wrote the text.
    These estimates stand where exact KLs do: in `estimator="exact"`, in metrics.

    Args:
        ids: [B, T, k], the tokens that are known, chosen without a look at the token that is there; distinct.
        logps: [B, T, k], their log-probabilities, in nats, at temperature 1. -inf pads: it says nothing of the token.
        sampled_logp: [B, T], of the token itself.

    Column t is about token t given what stands before it, as in input_ids; column 0 predicts nothing and is not read.
    Raises ValueError for shapes that do not fit, NaN, duplicates, and more probability than 1.
    """

    fixed_text = "only log-probabilities of given tokens are known"

    def __init__(self, ids: Int[Tensor, "..."], logps: Float[Tensor, "..."], sampled_logp: Float[Tensor, "..."]):
        if ids.dim() != 3 or logps.shape != ids.shape or sampled_logp.shape != ids.shape[:2]:
            raise ValueError(
                f"TopKReference: expected ids and logps [B, T, k] and sampled_logp [B, T], got {list(ids.shape)}, "
                f"{list(logps.shape)} and {list(sampled_logp.shape)}"
            )
        self.ids, self.logps, self.sampled_logp = ids, upcast(logps.detach()), upcast(sampled_logp.detach())
        known = self._known
        ordered = torch.where(known, ids, -1 - torch.arange(ids.shape[2], device=ids.device)).sort(-1).values
        mass = torch.where(known, self.logps, -torch.inf).exp().sum(-1)
        for problem, places in {
            "logps or sampled_logp is NaN": self.logps.isnan().any(-1) | self.sampled_logp.isnan(),
            "an id stands twice": (ordered[..., 1:] == ordered[..., :-1]).any(-1),
            "logps (nats) hold more probability than 1": (mass > 1.001) | (self.sampled_logp > 0.001),
        }.items():
            if bool(places.any()):
                raise ValueError(f"TopKReference: {problem} at [sample, position] {places.nonzero()[0].tolist()}")

    @one_line
    def __repr__(self) -> str:
        return f"ids {list(self.ids.shape)}, {self.logps.dtype}, {self.logps.device}"

    @property
    def vocab_size(self) -> int:
        """Ids up to the largest that is known: its head may have more rows."""
        return int(self.ids.max()) + 1 if self.ids.numel() else 0

    @property
    def _known(self) -> Bool[Tensor, "B T k"]:
        return self.logps != -torch.inf

    @classmethod
    def from_vllm(
        cls, prompt_logprobs: PromptLogprobs, token_ids: Int[Tensor, "B T"], attention_mask: Int[Tensor, "B T"], k: int
    ) -> "TopKReference":
        """From what vLLM returned for these B texts under SamplingParams(prompt_logprobs=k), the same k.

        vLLM adds the text's own token to the k likeliest. It is not taken for one of them: a support that depends on
        the token would bias the KL. Raises ValueError where the texts are of other tokens.
        """
        ids, sampled = token_ids.new_zeros(*token_ids.shape, k), torch.zeros(token_ids.shape)
        logps = torch.full(ids.shape, -torch.inf)
        for row, text in enumerate(prompt_logprobs):
            places = attention_mask[row].nonzero().flatten().tolist()
            tokens = token_ids[row, places].tolist()
            same = all(entry is None or token in entry for token, entry in zip(tokens, text, strict=False))
            if len(places) != len(text) or not same:
                raise ValueError(f"TopKReference: prompt_logprobs {row} are of another text than token_ids {row}")
            for place, token, entry in zip(places, tokens, text, strict=True):
                if entry is not None:  # None: a text's first token
                    best = sorted(entry.items(), key=lambda item: (-item[1].logprob, item[0]))[:k]
                    ids[row, place, : len(best)] = ids.new_tensor([i for i, _ in best])
                    logps[row, place, : len(best)] = torch.tensor([p.logprob for _, p in best])
                    sampled[row, place] = entry[token].logprob
        return cls(ids, logps, sampled)

    def score(
        self, logits: Float[Tensor, "B T V"], token_ids: Int[Tensor, "B T"], mask: Bool[Tensor, "B T"], *,
        behaviour_logp: Float[Tensor, "B T"] | None = None, temperature: float = 1.0,
    ) -> TokenScores:  # fmt: skip
        """logp, ref_logp and both KLs [B, T] of the tokens where `mask` holds, 0 elsewhere. Differentiable in logits.

        `logits[:, t]` are what predicts token t: shifted already, as KLPenalty.measure has them. Raises ValueError for
        another temperature, another shape, and where sampled_logp contradicts logps: then it is of other tokens.
        """
        if temperature != 1:
            raise ValueError(f"TopKReference: logps are of temperature 1, and cannot be had at {temperature}")
        chosen = logits[mask]
        return self._scores(
            lambda ids: upcast(chosen.gather(-1, ids)), lambda ids: token_logps(chosen, ids),
            chosen.shape[-1], token_ids, mask, behaviour_logp,
        )  # fmt: skip

    def score_hidden(
        self, hidden: Float[Tensor, "B T D"], head: LMHead, token_ids: Int[Tensor, "B T"], mask: Bool[Tensor, "B T"], *,
        behaviour_logp: Float[Tensor, "B T"] | None = None,
    ) -> TokenScores:  # fmt: skip
        """`score` without logits: from hidden states that predict token_ids (no shift), and rows of the head."""
        if head.shard is not None:
            raise ValueError("TopKReference: the head is split over processes, and rows of all of it are needed")
        chosen = hidden[mask]
        return self._scores(
            lambda ids: _logits_at(head, chosen, ids), lambda ids: token_scores(chosen, head, ids).logp,
            head.vocab_size, token_ids, mask, behaviour_logp,
        )  # fmt: skip

    def _scores(
        self,
        z_of: Ids2Numbers,
        logp_of: Ids2Numbers,
        size: int,
        token_ids: Tensor,
        mask: Tensor,
        behaviour: Tensor | None,
    ) -> TokenScores:
        """From functions of ids: logits [N, m] of ids [N, m], log-probabilities [N] of ids [N]; `size`: vocabulary."""
        if token_ids.shape != self.sampled_logp.shape:
            shapes = f"{list(self.sampled_logp.shape)}, token_ids {list(token_ids.shape)}"
            raise ValueError(f"TopKReference: it is of another batch: sampled_logp {shapes}")
        known, ref_logps = (t.to(mask.device)[mask] for t in (self._known, self.logps))
        ids, ref_logp = (t.to(mask.device)[mask] for t in (self.ids, self.sampled_logp))
        ids, own = ids.masked_fill(~known, 0), token_ids[mask].unsqueeze(-1)
        wanted = torch.cat([ids, own], -1)
        check_ids(wanted, size, "TopKReference")
        z = z_of(wanted)
        # log Z from the likeliest of them, which cannot be -inf.
        likeliest = z.detach().argmax(-1, keepdim=True)
        logps = z - z.gather(-1, likeliest) + logp_of(wanted.gather(-1, likeliest).squeeze(-1)).unsqueeze(-1)
        same = (ids == own) & known
        inside, its_own = same.any(-1), torch.where(same, ref_logps, 0.0).sum(-1)
        if bool((inside & ((its_own - ref_logp).abs() > 1e-2)).any()):
            raise ValueError(
                "TopKReference: sampled_logp is not what logps say of the same token: is it shifted by one?"
            )
        ref_logps, ref_logp = ref_logps.to(z), ref_logp.to(z)
        behaviour = None if behaviour is None else behaviour[mask].to(z)
        found = {"logp": logps[:, -1], "ref_logp": ref_logp}
        for direction in ("reverse", "forward"):
            found[f"{direction}_kl"] = support_kl(
                torch.where(known, logps[:, :-1], -torch.inf), ref_logps, inside, logps[:, -1], ref_logp,
                direction=direction, behaviour_logp=behaviour,
            )  # fmt: skip
        return TokenScores(**{name: scatter_masked(t, mask) for name, t in found.items()})


def _logits_at(head: LMHead, hidden: Float[Tensor, "N D"], ids: Int[Tensor, "N m"]) -> Float[Tensor, "N m"]:
    """Logits of some ids per token: in chunks, from the head's rows of those alone, gathered again in the backward."""

    def chunk(hidden: Tensor, ids: Tensor) -> Tensor:
        rows, places = ids.unique(return_inverse=True)
        few = replace(head, weight=head.weight[rows], bias=None if head.bias is None else head.bias[rows])
        return few.logits(hidden).gather(-1, places)

    parts = zip(hidden.split(CHUNK), ids.split(CHUNK), strict=True)
    return torch.cat([checkpoint(chunk, *part, use_reentrant=False, preserve_rng_state=False) for part in parts])  # pyright: ignore
