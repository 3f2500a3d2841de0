"""One rollout: prompts -> completions -> scores of every generated token, with masks that come from lengths alone."""

from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from klft.fused import token_scores
from klft.generation import Batch
from klft.heads import LMHead
from klft.masked import spread
from klft.models import base_of, causal_inputs, evaluating, hidden_states
from klft.ppo.value import OUTPUT_KEY, with_values
from klft.scores import TokenScores
from klft.sharding import VocabShard


@dataclass
class Rollout(Batch):
    """A batch with all that the PPO epochs read: [B, C] each, detached, 0 where the mask is False."""

    old_logp: Tensor
    ref_logp: Tensor
    values: Tensor
    advantages: Tensor
    returns: Tensor

    def tensors(self) -> dict[str, Tensor]:
        """By name, as a checkpoint keeps them."""
        return {f.name: getattr(self, f.name).contiguous() for f in fields(self)}


@dataclass
class Scorer:
    """Both models' forwards over a batch, without logits: at one temperature and over the vocabulary they share.

    split: one of config.VOCABULARY_SPLITS.
    """

    reference: Any
    temperature: float
    vocab_size: int
    split: str = "none"

    def forward(self, model: nn.Module, unwrapped: nn.Module, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """The training forward: (hidden [B, C, D], values [B, C], value after the last token [B])."""
        ids, attention = batch.inputs
        keep = batch.completion_ids.shape[1] + 1
        with with_values(unwrapped), hidden_states(model) as kept:
            output = model(**causal_inputs(unwrapped, ids, attention, keep))
        values = output[OUTPUT_KEY][:, -keep:]
        return kept.hidden[:, -keep:-1], values[:, :-1], values[:, -1]

    def head(self, model: nn.Module) -> LMHead:
        """The policy's head for this step. ValueError where it does not lie as `split` says."""
        by_rows = self.split == "dp" and isinstance(base_of(model).get_output_embeddings().weight, DTensor)
        head = LMHead.from_model(model, shard_rows=by_rows)
        tensor_parallel = head.shard is not None and not head.shard.own_tokens
        if (self.split == "tp") != tensor_parallel and self.split != "auto":
            has = "is" if tensor_parallel else "is not"
            raise ValueError(f"kl_shard_vocab={self.split}: the policy's head {has} tensor parallel; use auto")
        head = head.cut(self.vocab_size)
        if self.split == "dp" and head.shard is None:
            head = head.narrow(VocabShard.even(self.vocab_size, own_tokens=True))
        return head

    def inputs(self, model: nn.Module, hidden: Tensor, batch: Batch, reference: bool = True) -> dict[str, Any]:
        """The tokens that count, as arguments of token_scores and fused_token_loss."""
        mask = batch.mask
        found = {"hidden": hidden[mask], "head": self.head(model), "token_ids": batch.completion_ids[mask]}
        if reference:
            ids, attention = batch.inputs
            ref_hidden, ref_head = self.reference.hidden(ids, attention, batch.completion_ids.shape[1] + 1)
            found |= {"ref_hidden": ref_hidden[:, :-1][mask], "ref_head": ref_head.cut(self.vocab_size)}
        return found | {"temperature": self.temperature}

    def score(
        self, model: nn.Module, unwrapped: nn.Module, batch: Batch, size: int, top_k: int = 0
    ) -> tuple[TokenScores, Tensor, Tensor]:
        """(scores [B, C], 0 where the mask is False, values, last values), `size` rows at a time."""
        parts = []
        with evaluating(unwrapped):
            for start in range(0, len(batch.mask), size):
                micro = batch.rows(slice(start, start + size))
                hidden, values, last = self.forward(model, unwrapped, micro)
                scores = token_scores(**self.inputs(model, hidden, micro), top_k=top_k)
                parts.append((scores, values, last))
        found = {}
        for f in fields(TokenScores):
            flat = [getattr(part[0], f.name) for part in parts]
            if flat[0] is not None:
                found[f.name] = spread(torch.cat(flat), batch.mask)
        return TokenScores(**found), torch.cat([p[1] for p in parts]), torch.cat([p[2] for p in parts])
