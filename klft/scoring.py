"""Two models over a batch -> TokenScores, exact and without logits: the one scorer of PPO, diagnostics and callbacks.

    scorer = Scorer(reference, temperature=0.7)
    scores = scorer.score_batch(model, input_ids, attention_mask, mask)     # [B, T] each

    for batch in score_texts(model, reference, tokenizer, texts, batch_size=8, max_length=512):
        log.add(batch.scores, batch.token_ids, batch.attention_mask, scored=batch.mask, sample_ids=batch.sample_ids)

Where a head cannot be read (an adapter or quantisation on it), that model is scored from its logits instead. Padded
vocabularies are cut to the ids both models have, which is said once; what that takes is measured in every batch. Both
models run in eval mode without gradients and get their modes back.
"""

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, get_args

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from klft.fused import token_scores
from klft.heads import LMHead
from klft.masked import scatter_masked
from klft.models import (
    VocabularyCut,
    base_of,
    causal_inputs,
    check_causal,
    check_positions,
    check_vocabularies,
    evaluating,
    hidden_states,
    max_positions,
    require_causal_lm,
    vocab_size,
)
from klft.prompts import Encoded, Text, encode_texts, pad, pad_id
from klft.references import Reference, resolve_reference
from klft.scores import TokenScores, check_temperature, score_logits
from klft.sharding import VocabShard, on_rank

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

LOGITS_CHUNK = 256  # tokens whose logits are in fp32 at a time, where a model can only be scored from logits
Sharding = Literal["auto", "tp", "dp", "none"]
SHARDINGS: tuple[Sharding, ...] = get_args(Sharding)


@dataclass
class Predictions:
    """One model's predictions of N tokens: hidden states and the head that reads them, or else logits."""

    hidden: Float[Tensor, "N D"] | None = None
    head: LMHead | None = None
    logits: Float[Tensor, "N V"] | None = None

    @property
    def vocab_size(self) -> int:
        """Vocabulary rows, here and on other processes."""
        if self.head is not None:
            return self.head.vocab_size
        assert self.logits is not None
        return self.logits.shape[-1]

    def on(self, device: torch.device) -> "Predictions":
        """The same on a device: a reference may live on another one."""
        hidden, head, logits = (None if t is None else t.to(device) for t in (self.hidden, self.head, self.logits))
        return Predictions(hidden, head, logits)  # pyright: ignore[reportArgumentType]

    def chunk(self, rows: slice) -> Float[Tensor, "n V"]:
        """Logits of some of the tokens, in fp32 or fp64."""
        if self.head is not None and self.hidden is not None:
            return self.head.logits(self.hidden[rows])
        assert self.logits is not None
        return self.logits[rows].to(torch.promote_types(self.logits.dtype, torch.float32))


class Scorer:
    """Two models over batches, at one temperature and over the vocabulary they share.

    Args:
        reference: read through its protocol alone.
        temperature: divides both models' logits.
        top_k: likeliest tokens of both models to return.
        shard_vocab: "auto": follow the policy head's placement; "tp": its tensor-parallel shards, an error if it has
            none; "dp": shard the vocabulary over data-parallel ranks, all-gather hidden states; "none": replicated.
    """

    def __init__(self, reference: Reference, *, temperature: float = 1.0, top_k: int = 0, shard_vocab: str = "auto"):
        check_temperature(temperature)
        self.reference, self.temperature, self.top_k = reference, temperature, top_k
        self.shard_vocab = shard_vocab
        self._cut = VocabularyCut()
        self._from_logits = {"policy": False, "reference": False}

    def shared_vocab(self, model: nn.Module) -> int:
        """Number of ids that both models have a row for."""
        return min(vocab_size(model), self.reference.vocab_size)

    # ---- the two sides -----------------------------------------------------------------------------------------------

    def policy_head(self, model: nn.Module) -> LMHead:
        """The policy's head for this step.

        Raises TypeError where it cannot be read, ValueError where it does not lie as shard_vocab says.
        """
        by_rows = self.shard_vocab == "dp" and isinstance(base_of(model).get_output_embeddings().weight, DTensor)
        head = LMHead.from_model(model, shard_rows=by_rows)
        tensor_parallel = head.shard is not None and not head.shard.own_tokens
        if (self.shard_vocab == "tp") != tensor_parallel and self.shard_vocab != "auto":
            has = "is" if tensor_parallel else "is not"
            raise ValueError(f"kl_shard_vocab={self.shard_vocab}: the policy's head {has} tensor parallel; use auto")
        return head

    def policy_side(self, model: nn.Module, inputs: dict[str, Any], predicts: Bool[Tensor, "B K"]) -> Predictions:
        """One forward of the policy, at the positions among the last K where `predicts` holds."""
        keep = predicts.shape[1]
        if not self._from_logits["policy"]:
            try:
                with hidden_states(model) as kept:
                    model(**inputs)
                return Predictions(kept.hidden[:, -keep:][predicts], self.policy_head(model))
            except TypeError as error:
                self._fall_back("policy", error)
        return Predictions(logits=model(**inputs).logits[:, -keep:][predicts])

    def reference_side(
        self, ids: Int[Tensor, "B T"], attention: Int[Tensor, "B T"], predicts: Bool[Tensor, "B K"]
    ) -> Predictions:
        """One forward of the reference, likewise; on the device of ids."""
        keep = predicts.shape[1]
        if not self._from_logits["reference"]:
            try:
                hidden, head = self.reference.hidden(ids, attention, keep)
                return Predictions(hidden[predicts.to(hidden.device)], head).on(ids.device)
            except TypeError as error:
                self._fall_back("reference", error)
        return Predictions(logits=self.reference.logits(ids, attention, keep)[predicts])

    def _fall_back(self, role: str, error: TypeError) -> None:
        logger.info("scoring the %s from logits: %s", role, error)
        self._from_logits[role] = True

    # ---- both together -----------------------------------------------------------------------------------------------

    def fused_inputs(
        self, policy: Predictions, reference: Predictions | None, token_ids: Int[Tensor, "N"]
    ) -> dict[str, Any]:
        """Arguments of token_scores and fused_token_loss. TypeError where the reference's head cannot be read."""
        assert policy.head is not None
        inputs = {"hidden": policy.hidden, "token_ids": token_ids, "temperature": self.temperature}
        shared = min(policy.vocab_size, self.reference.vocab_size)
        if reference is not None:
            if reference.head is None:
                raise TypeError("the reference's head cannot be read, and its exact KL without logits needs it")
            self._report_cut(policy, reference, token_ids)
            inputs |= {"ref_hidden": reference.hidden, "ref_head": reference.head.cut(shared)}
        head = policy.head.cut(shared)
        if self.shard_vocab == "dp" and head.shard is None:
            head = head.narrow(VocabShard.even(shared, own_tokens=True))
        return inputs | {"head": head}

    @torch.no_grad()
    def score(self, policy: Predictions, reference: Predictions, token_ids: Int[Tensor, "N"]) -> TokenScores:
        """Scores [N] of the tokens that the two predict."""
        if policy.head is not None and reference.head is not None:
            inputs = self.fused_inputs(policy, reference, token_ids)
            return token_scores(**inputs, top_k=min(self.top_k, inputs["head"].vocab_size))
        shared = min(policy.vocab_size, reference.vocab_size)
        chunks = []
        for start in range(0, max(1, len(token_ids)), LOGITS_CHUNK):
            rows = slice(start, start + LOGITS_CHUNK)
            z, y = (self._cut(side.chunk(rows), shared) / self.temperature for side in (policy, reference))
            scores = score_logits(z, y, token_ids[rows])
            if self.top_k:
                k = min(self.top_k, shared)
                scores.top_p, scores.top_ids = z.softmax(-1).topk(k)
                scores.ref_top_p, scores.ref_top_ids = y.softmax(-1).topk(k)
            chunks.append(dict(scores.items()))
        return TokenScores(**{name: torch.cat([chunk[name] for chunk in chunks]) for name in chunks[0]})

    @torch.no_grad()
    def _report_cut(self, policy: Predictions, reference: Predictions, token_ids: Tensor) -> None:
        if policy.vocab_size == reference.vocab_size:
            return
        shared = min(policy.vocab_size, reference.vocab_size)
        wider = policy if policy.vocab_size > shared else reference
        assert wider.head is not None
        assert wider.hidden is not None
        # Cutting divides every other probability by what the cut ids leave over.
        hidden, token_ids = self._cut.some(wider.hidden), self._cut.some(token_ids)
        of_all, of_shared = (token_scores(hidden, h, token_ids).logp for h in (wider.head, wider.head.cut(shared)))
        self._cut.check(wider.vocab_size, shared, -torch.expm1(of_all - of_shared))

    def score_batch(
        self, model: nn.Module, ids: Int[Tensor, "B T"], attention: Int[Tensor, "B T"], mask: Bool[Tensor, "B T"]
    ) -> TokenScores:
        """Scores [B, T] of the tokens where `mask` holds, 0 elsewhere, in eval mode. mask[:, 0] must be False."""
        predicts = mask.roll(-1, 1)  # a token's prediction lies one position before it
        with evaluating(model):
            policy = self.policy_side(model, causal_inputs(model, ids, attention, ids.shape[1]), predicts)
            reference = self.reference_side(ids, attention, predicts)
        flat = self.score(policy, reference, ids[mask])
        return TokenScores(**{name: scatter_masked(t, mask) for name, t in flat.items()})


# ---- texts ----------------------------------------------------------------------------------------------------------


class ScoredTexts(NamedTuple):
    """A batch of B texts, padded on the right to T tokens; on the CPU."""

    scores: TokenScores  # [B, T] each, top lists [B, T, K]: under each token what was predicted there; 0 off the mask
    token_ids: Int[Tensor, "B T"]
    mask: Bool[Tensor, "B T"]  # True where a token was predicted, which the first one of a text is not
    is_prompt: Bool[Tensor, "B T"]
    sample_ids: Int[Tensor, "B"]  # number of the text among those given
    attention_mask: Bool[Tensor, "B T"]  # True on real tokens, the first one too: what to show


def score_texts(
    model: nn.Module,
    reference: "Reference | PreTrainedModel | None",
    tokenizer: "PreTrainedTokenizerBase",
    texts: Sequence[Text] | Encoded,
    *,
    batch_size: int,
    max_length: int,
    temperature: float = 1.0,
    top_k: int = 5,
) -> Iterator[ScoredTexts]:
    """Score each token of the texts under the policy `model` and a reference: everything in TokenScores, in nats.

    The texts are given, not sampled from the policy (`scores.sampled` is False): the KLs are exact, k1, k2 and k3 of
    these tokens would estimate neither. Under tensor parallelism or FSDP2 all processes score the same texts together.

    Args:
        reference: as resolve_reference takes it: a reference, a second causal LM (it is frozen), or None where the
            policy has an adapter: then the policy with its adapter off.
        texts: what `encode_texts` takes, token ids too; or what it gives, which is then scored as it is.

    Raises ValueError for vocabularies that cannot be compared, texts longer than a model has positions, and where no
    text has a token to score; TypeError for what is no causal language model. All of that before the first batch; with
    a batch, ValueError for logits that are NaN, and where the ids that only one model has are no padding.
    """
    if batch_size < 1 or top_k < 0:
        raise ValueError(f"batch_size must be at least 1 and top_k at least 0, got {batch_size} and {top_k}")
    check_temperature(temperature)
    require_causal_lm(model, "model")
    reference = resolve_reference(reference, model)
    check_vocabularies(tokenizer, policy=vocab_size(model), reference=reference.vocab_size)
    encoded = texts if isinstance(texts, Encoded) else encode_texts(tokenizer, texts, max_length=max_length)
    longest = max(map(len, encoded.ids), default=0)
    check_positions(longest, model=max_positions(model), reference=reference.max_positions)
    check_causal(model)
    scorer = Scorer(reference, temperature=temperature, top_k=top_k)
    return _score_batches(scorer, model, encoded, pad_with=pad_id(tokenizer), batch_size=batch_size)


def _check_numbers(
    scores: TokenScores, mask: Bool[Tensor, "B T"], sample_ids: list[int], names: dict[str, str]
) -> None:
    """Raise ValueError, naming model, text and position, where a model's logits are NaN or +inf."""
    for (role, name), prefix in zip(names.items(), ("", "ref_"), strict=True):
        logp, entropy = (getattr(scores, f"{prefix}{score}") for score in ("logp", "entropy"))
        nonfinite = mask & (logp.isnan() | entropy.isnan())
        if nonfinite.any():
            row, position = nonfinite.nonzero()[0].tolist()
            raise ValueError(
                f"the {role} {name}: its logits are not finite{on_rank()} for text {sample_ids[row] + 1}, position "
                f"{position} ({int(nonfinite.sum())} of {int(mask.sum())} tokens of the batch). Its weights "
                "hold NaN or inf, or it overflows in this precision: try float32"
            )


def _score_batches(
    scorer: Scorer, model: nn.Module, texts: Encoded, *, pad_with: int, batch_size: int
) -> Iterator[ScoredTexts]:
    device = next(model.parameters()).device
    for start in range(0, len(texts.ids), batch_size):
        batch = texts.rows(slice(start, start + batch_size))
        ids, attention = pad(batch.ids, pad_with, side="right")
        position = torch.arange(ids.shape[1])
        mask = attention & (position > 0)
        scores = scorer.score_batch(model, ids.to(device), attention.long().to(device), mask.to(device))
        scores = TokenScores(**{name: t.cpu() for name, t in scores.items()})
        names = {"policy": base_of(model).config._name_or_path, "reference": scorer.reference.name}
        _check_numbers(scores, mask, batch.sample_ids, names)
        scores = TokenScores(**dict(scores.items()), sampled=torch.zeros_like(mask))
        is_prompt = attention & (position < torch.tensor(batch.prompt_lengths)[:, None])
        for row, number in enumerate(batch.sample_ids):
            if number in batch.turns:
                is_prompt[row] = attention[row]
                for start, stop in batch.turns[number].counted:
                    is_prompt[row, start:stop] = False
        yield ScoredTexts(scores, ids, mask, is_prompt, torch.tensor(batch.sample_ids), attention)
