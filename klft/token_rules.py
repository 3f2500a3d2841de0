"""Token rules: how much the KL of each token counts. A rule is a function that KLPenalty and PPOTrainer take.

    rule(token_ids [*B] or None, mask [*B], scores) -> weight [*B], finite and >= 0

    rule = combine(burn_in(4), by_ids({tokenizer.eos_token_id: 0.0}))
    KLPenalty(reference, token_rule=rule)
    PPOTrainer(..., token_rule=rule)

The weight multiplies the token's KL in the reward, in the loss, in what the controller sees and in what is logged; the
score, the policy loss and the value loss stay whole. Weight 1 changes nothing, bit for bit; a token of weight 0 counts
in no mean, and its KL may be infinite. Weights are not normalised: halving all of them halves the KL.
"""

import math
import zlib
from collections.abc import Callable, Mapping
from typing import Protocol

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


class Scores(Protocol):
    """The part of klft.TokenScores that rules read: [*B] each."""

    @property
    def logp(self) -> Tensor: ...
    @property
    def ref_entropy(self) -> Tensor | None: ...


class Decoder(Protocol):
    """The part of a tokenizer that find_ids needs."""

    def __len__(self) -> int: ...
    def decode(self, token_ids: list[int]) -> str | list[str]: ...


Rule = Callable[[Tensor | None, Tensor, Scores], Tensor]
"""(token_ids, mask, scores), [*B] each -> weight [*B]: klft.penalty.TokenRule, by what it reads."""


def _named(name: str, rule: Rule) -> Rule:
    """The rule by its arguments: a checkpoint keeps the name, so that a run resumed with another rule is refused."""
    rule.__name__ = name  # pyright: ignore - a function has one
    return rule


def _number(where: str, value: float, most: float = math.inf) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= most or value == math.inf:
        limit = "" if most == math.inf else f" and <= {most:g}"
        raise ValueError(f"{where} must be a finite number >= 0{limit}, got {value!r}")
    return float(value)


def constant(weight: float) -> Rule:
    """weight on every token of the mask. With 1, what no rule does; other values scale the coefficient."""
    weight = _number("constant: weight", weight)
    return _named(f"constant({weight:g})", lambda token_ids, mask, scores: torch.full_like(scores.logp, weight))


def by_mask(kl_mask: Bool[Tensor, "*B"]) -> Rule:
    """1 where kl_mask holds, 0 elsewhere: a KL on fewer tokens than the reward is on, of one batch of your own loop."""
    return _named(f"by_mask({list(kl_mask.shape)})", lambda token_ids, mask, scores: kl_mask.to(scores.logp))


def by_ids(weights: Mapping[int, float], *, others: float = 1.0) -> Rule:
    """weights[id] on the ids in the table, `others` on all the rest.

    For special tokens, dict.fromkeys(klft.prompts.eos_ids(model, tokenizer), 0.0) or of tokenizer.all_special_ids:
    when to end, and what the template wrote, is then not held to the reference. For classes of tokens, see find_ids.
    Raises ValueError for an empty table, an id below 0, and where the tokens' ids are not given.
    """
    ids = sorted(weights) if isinstance(weights, Mapping) and all(isinstance(i, int) for i in weights) else []
    if not ids or ids[0] < 0:
        raise ValueError(f"by_ids: expected a table id -> weight of ids >= 0, got {weights!r:.80}")
    others = _number("by_ids: others", others)
    table = torch.full((ids[-1] + 2,), others, dtype=torch.float64)  # its last entry is that of every id beyond
    table[ids] = torch.tensor([_number(f"by_ids: the weight of id {i}", weights[i]) for i in ids], dtype=torch.float64)

    def rule(token_ids: Tensor | None, mask: Tensor, scores: Scores) -> Tensor:
        if token_ids is None:
            raise ValueError("by_ids reads the tokens' ids: pass measure_scores(..., token_ids=...)")
        return table[token_ids.cpu().clamp(0, len(table) - 1)].to(scores.logp)

    return _named(f"by_ids({len(ids)} ids, {zlib.crc32(repr(table.tolist()).encode()):08x})", rule)


def find_ids(tokenizer: Decoder, chosen: Callable[[str], bool]) -> list[int]:
    """Ids whose text, decoded on its own, is chosen: the digits by lambda text: text.strip().isdigit(), for instance.

    by_ids(dict.fromkeys(find_ids(tokenizer, chosen), 0.1)) weighs them. A piece that is no text by itself reads as
    U+FFFD. Raises ValueError where none is chosen.
    """
    ids = [i for i in range(len(tokenizer)) if chosen(str(tokenizer.decode([i])))]
    if not ids:
        raise ValueError(f"find_ids: none of {len(tokenizer)} ids decodes to a text that is chosen")
    return ids


def _place(name: str, mask: Bool[Tensor, "*B"]) -> Int[Tensor, "*B"]:
    """0 for the first token that counts in a row, 1 for the next ...; masked tokens have that of the one before."""
    if mask.dim() < 2:
        raise ValueError(
            f"{name} counts along sequences: it needs them in rows, [B, T], and got {list(mask.shape)}; measure whole "
            "sequences, and pass kl.weight[kl.mask] to token_losses"
        )
    return (mask.long().cumsum(-1) - 1).clamp(min=0)


def burn_in(tokens: int) -> Rule:
    """0 on the first `tokens` tokens of each completion, 1 after them: a free start, as a new format or style needs.

    Counted are the tokens of the mask. Raises ValueError for tokens that are not in rows [B, T].
    """
    if isinstance(tokens, bool) or not isinstance(tokens, int) or tokens < 0:
        raise ValueError(f"burn_in: tokens must be a whole number >= 0, got {tokens!r}")
    name = f"burn_in({tokens})"
    return _named(name, lambda token_ids, mask, scores: (_place(name, mask) >= tokens).to(scores.logp))


def decay(gamma: float) -> Rule:
    """gamma^t, 0 <= gamma <= 1, t = 0 on a completion's first token: the start is held, what follows from it less.

    Counted are the tokens of the mask. Raises ValueError for tokens that are not in rows [B, T].
    """
    gamma = _number("decay: gamma", gamma, most=1.0)
    name = f"decay({gamma:g})"
    return _named(name, lambda token_ids, mask, scores: gamma ** _place(name, mask).to(scores.logp))


def _ref_entropy(scores: Scores) -> Float[Tensor, "*B"]:
    if scores.ref_entropy is None:
        raise ValueError("the rule reads the reference's entropy, and these scores have none: score with a reference")
    return scores.ref_entropy.detach()


def by_ref_entropy(least: float = 0.0, below: float = math.inf) -> Rule:
    """1 where least <= H < below, else 0; H: entropy of the reference's prediction of the token, in nats.

    With `below` the KL holds what the reference is sure of, and leaves its open choices to the reward; with `least` the
    other way round.
    """
    if not 0 <= least < below:
        raise ValueError(f"by_ref_entropy: expected 0 <= least < below, in nats, got least={least!r}, below={below!r}")

    def rule(token_ids: Tensor | None, mask: Tensor, scores: Scores) -> Tensor:
        entropy = _ref_entropy(scores)
        inside = (entropy >= least) & (entropy < below)
        return torch.where(entropy.isnan(), entropy, inside.to(entropy))  # a NaN is refused, not left out

    return _named(f"by_ref_entropy({least:g}, {below:g})", rule)


def along_ref_entropy(one_at: float, zero_at: float) -> Rule:
    """by_ref_entropy without its step: 1 at an entropy of one_at nats, 0 at zero_at, a straight line between.

    Beyond them it stays 1, or 0. Either may be the larger.
    """
    one_at, zero_at = _number("along_ref_entropy: one_at", one_at), _number("along_ref_entropy: zero_at", zero_at)
    if one_at == zero_at:
        raise ValueError(f"along_ref_entropy: one_at and zero_at are both {one_at:g}: for a step, take by_ref_entropy")

    def rule(token_ids: Tensor | None, mask: Tensor, scores: Scores) -> Tensor:
        return ((_ref_entropy(scores) - zero_at) / (one_at - zero_at)).clamp(0, 1)

    return _named(f"along_ref_entropy({one_at:g}, {zero_at:g})", rule)


def combine(*rules: Rule) -> Rule:
    """The product of the rules' weights. Raises ValueError for no rule, and where one gives another shape."""
    names = [getattr(factor, "__name__", type(factor).__name__) for factor in rules]
    if not rules:
        raise ValueError("combine: expected one rule or more, got none")

    def rule(token_ids: Tensor | None, mask: Tensor, scores: Scores) -> Tensor:
        product = torch.ones_like(scores.logp)
        for name, factor in zip(names, rules, strict=True):
            weight = factor(token_ids, mask, scores)
            if weight.shape != mask.shape:  # broadcast, one weight per row could become one per column
                raise ValueError(f"combine: {name} gives weights {list(weight.shape)} for tokens {list(mask.shape)}")
            product = product * weight.to(product)
        return product

    return _named(f"combine({', '.join(names)})", rule)
