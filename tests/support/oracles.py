"""Float64 reference implementations, from the formulas alone: nothing here imports klft.

Gradients come from autograd through the plain formulas. Expectations are exact: every token, or every sequence, of a
small model is enumerated, so no test that uses them needs a seed, a sample size or a loose tolerance.
"""

import itertools
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from types import SimpleNamespace

import torch
from torch import Tensor

# --- full-vocabulary divergences, [*, V] x [*, V] -> [*] -------------------------------------------------------------


def _pair(logits: Tensor, ref_logits: Tensor) -> tuple[Tensor, Tensor]:
    return torch.log_softmax(logits.double(), -1), torch.log_softmax(ref_logits.double(), -1)


def reverse_kl(logits: Tensor, ref_logits: Tensor) -> Tensor:
    lp, lq = _pair(logits, ref_logits)
    return (lp.exp() * (lp - lq)).sum(-1)


def forward_kl(logits: Tensor, ref_logits: Tensor) -> Tensor:
    lp, lq = _pair(logits, ref_logits)
    return (lq.exp() * (lq - lp)).sum(-1)


def jsd(logits: Tensor, ref_logits: Tensor, weight: float) -> Tensor:
    lp, lq = _pair(logits, ref_logits)
    p, q = lp.exp(), lq.exp()
    lm = (weight * q + (1 - weight) * p).log()
    return (weight * q * (lq - lm) + (1 - weight) * p * (lp - lm)).sum(-1)


def skew_kl(logits: Tensor, ref_logits: Tensor, alpha: float) -> Tensor:
    lp, lq = _pair(logits, ref_logits)
    p, q = lp.exp(), lq.exp()
    return (q * (lq - (alpha * q + (1 - alpha) * p).log())).sum(-1)


def skew_reverse_kl(logits: Tensor, ref_logits: Tensor, alpha: float) -> Tensor:
    lp, lq = _pair(logits, ref_logits)
    p, q = lp.exp(), lq.exp()
    return (p * (lp - (alpha * p + (1 - alpha) * q).log())).sum(-1)


def alpha_divergence(logits: Tensor, ref_logits: Tensor, alpha: float) -> Tensor:
    p, q = (x.exp() for x in _pair(logits, ref_logits))
    return ((p**alpha * q ** (1 - alpha)).sum(-1) - 1) / (alpha * (alpha - 1))


def renyi_divergence(logits: Tensor, ref_logits: Tensor, alpha: float) -> Tensor:
    p, q = (x.exp() for x in _pair(logits, ref_logits))
    return (p**alpha * q ** (1 - alpha)).sum(-1).log() / (alpha - 1)


def entropy(logits: Tensor) -> Tensor:
    lp = torch.log_softmax(logits.double(), -1)
    return -(lp.exp() * lp).sum(-1)


def chi2(logits: Tensor, ref_logits: Tensor) -> Tensor:
    """sum p^2/q - 1: of the policy from the reference."""
    p, q = (x.exp() for x in _pair(logits, ref_logits))
    return (p * p / q).sum(-1) - 1


def total_variation(logits: Tensor, ref_logits: Tensor) -> Tensor:
    p, q = (x.exp() for x in _pair(logits, ref_logits))
    return (p - q).abs().sum(-1) / 2


def value_and_gradient(fn: Callable[..., Tensor], logits: Tensor, *rest, weight: Tensor | None = None):
    """fn(logits, *rest) and the gradient of its (weighted) sum in the logits."""
    leaf = logits.detach().clone().requires_grad_()
    value = fn(leaf, *rest)
    (gradient,) = torch.autograd.grad((value if weight is None else value * weight).sum(), leaf)
    return value.detach(), gradient


# --- estimators from sampled log-probabilities, [*] x [*] -> [*] ------------------------------------------------------


def k1(logp: Tensor, ref_logp: Tensor) -> Tensor:
    return logp.double() - ref_logp.double()


def k2(logp: Tensor, ref_logp: Tensor) -> Tensor:
    return k1(logp, ref_logp) ** 2 / 2


def k3(logp: Tensor, ref_logp: Tensor) -> Tensor:
    log_r = -k1(logp, ref_logp)
    return torch.expm1(log_r) - log_r


def forward_k1(logp: Tensor, ref_logp: Tensor) -> Tensor:
    log_r = -k1(logp, ref_logp)
    return log_r.exp() * log_r


def forward_k3(logp: Tensor, ref_logp: Tensor) -> Tensor:
    log_r = -k1(logp, ref_logp)
    return log_r.exp() * log_r - torch.expm1(log_r)


# --- two models as hidden states and heads: [N, D] x [V, D] -> logits [N, V] ------------------------------------------

# Every option of a head, alone and together; the reference has options of its own wherever the policy has one.
HEADS = {
    "plain": {},
    "bias": {"bias": True},
    "softcap": {"softcap": 2.5},
    "scale": {"scale": 0.6},
    "temperature": {"temperature": 0.7},
    "all": {"bias": True, "softcap": 2.5, "scale": 0.6, "temperature": 0.7},
}


def head_logits(hidden, weight, bias=None, *, scale=1.0, softcap=None, temperature=1.0) -> Tensor:
    """cap(scale * (h W^T + b)) / temperature in the precision of its inputs: the truth in float64, naive below."""
    logits = hidden @ weight.T
    logits = scale * (logits if bias is None else logits + bias)
    return (logits if softcap is None else softcap * torch.tanh(logits / softcap)) / temperature


def token_scores(logits: Tensor, ref_logits: Tensor, token_ids: Tensor) -> SimpleNamespace:
    """Everything that is known of a sampled token and its position, [N] each."""
    lp, lq = _pair(logits, ref_logits)
    rows = torch.arange(len(token_ids))
    return SimpleNamespace(
        logp=lp[rows, token_ids],
        ref_logp=lq[rows, token_ids],
        entropy=entropy(logits),
        ref_entropy=entropy(ref_logits),
        reverse_kl=reverse_kl(logits, ref_logits),
        forward_kl=forward_kl(logits, ref_logits),
        top1_agree=(lp.argmax(-1) == lq.argmax(-1)).double(),
    )


@dataclass
class TwoHeads:
    """A policy and a reference that share a vocabulary only: their hidden sizes differ too."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    ref_hidden: Tensor
    ref_weight: Tensor
    ref_bias: Tensor | None
    token_ids: Tensor
    temperature: float = 1.0
    options: dict = field(default_factory=dict)
    ref_options: dict = field(default_factory=dict)

    @property
    def leaves(self) -> list[Tensor]:
        return [self.hidden, self.weight, *([] if self.bias is None else [self.bias])]

    def logits(self, hidden: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        return head_logits(hidden, weight, bias, temperature=self.temperature, **self.options)

    @property
    def ref_logits(self) -> Tensor:
        ref = (self.ref_hidden, self.ref_weight, self.ref_bias)
        return head_logits(*ref, temperature=self.temperature, **self.ref_options).detach()

    def only(self, kept: list[int]) -> "TwoHeads":
        """Of these rows of the vocabulary only, which hold the sampled tokens; heads have a bias."""
        ids = torch.tensor([kept.index(i) for i in self.token_ids])
        rows = {name: getattr(self, name)[kept] for name in ("weight", "bias", "ref_weight", "ref_bias")}
        return replace(self, **rows, token_ids=ids)

    def tokens(self, rows) -> "TwoHeads":
        """Of these tokens only."""
        return replace(
            self, hidden=self.hidden[rows], ref_hidden=self.ref_hidden[rows], token_ids=self.token_ids[rows]
        )  # fmt: skip

    def vocabulary(self, rows: Tensor) -> "TwoHeads":
        """Over these words only, in this order; every sampled token must be among them."""
        biases = [None if bias is None else bias[rows] for bias in (self.bias, self.ref_bias)]
        place = {word: i for i, word in enumerate(rows.tolist())}
        ids = torch.tensor([place[word] for word in self.token_ids.tolist()], dtype=torch.long)
        return replace(
            self, weight=self.weight[rows], ref_weight=self.ref_weight[rows], bias=biases[0], ref_bias=biases[1],
            token_ids=ids,
        )  # fmt: skip

    def to(self, dtype: torch.dtype) -> "TwoHeads":
        """Rounded to a dtype; of a rounded one, `.to(torch.float64)` is the same numbers again."""
        names = ("hidden", "weight", "bias", "ref_hidden", "ref_weight", "ref_bias")
        values = {name: getattr(self, name) for name in names}
        return replace(self, **{name: None if x is None else x.to(dtype) for name, x in values.items()})


def two_heads(tokens, vocab, kind="plain", *, dim=5, ref_dim=4, seed=0) -> TwoHeads:
    """Logits of standard deviation about 1.5, with the options of a row of HEADS."""
    given = HEADS[kind]
    gen = torch.Generator().manual_seed(seed)

    def normal(*shape, size=1.0):
        return size * torch.randn(*shape, generator=gen, dtype=torch.float64)

    biased = given.get("bias", False)
    options = {name: given[name] for name in ("scale", "softcap") if name in given}
    return TwoHeads(
        normal(tokens, dim), normal(vocab, dim, size=1.5 / dim**0.5), normal(vocab) if biased else None,
        normal(tokens, ref_dim), normal(vocab, ref_dim, size=1.5 / ref_dim**0.5),
        normal(vocab) if biased else None,
        torch.randint(vocab, (tokens,), generator=gen), given.get("temperature", 1.0), options,
        {name: 1.3 * value for name, value in options.items()},
    )  # fmt: skip


def dead_words(two, dead, policy=True, ref=True, value=-torch.inf):
    """Words that neither model, or one of them, can say."""
    two = replace(two, bias=two.bias.clone(), ref_bias=two.ref_bias.clone())
    if policy:
        two.bias[dead] = value
    if ref:
        two.ref_bias[dead] = value
    return two


def value_and_gradients(fn: Callable[..., Tensor], leaves: list[Tensor], weight: Tensor | float = 1.0) -> list[Tensor]:
    """fn(*leaves) and the gradient of its (weighted) sum in each of them."""
    leaves = [leaf.detach().clone().requires_grad_() for leaf in leaves]
    value = fn(*leaves)
    return [value.detach(), *torch.autograd.grad((value * weight).sum(), leaves)]


# --- one position, every token ---------------------------------------------------------------------------------------


def one_position(vocab_size: int = 7, seed: int = 0, spread: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
    """Logits of a policy, of a reference and of a third policy that may have sampled: [V] each."""
    gen = torch.Generator().manual_seed(seed)
    theta = torch.randn(vocab_size, generator=gen, dtype=torch.float64)
    ref = theta + spread * torch.randn(vocab_size, generator=gen, dtype=torch.float64)
    behaviour = theta + spread * torch.randn(vocab_size, generator=gen, dtype=torch.float64)
    return theta, ref, behaviour


def every_token(fn: Callable[[Tensor, Tensor], Tensor], logits: Tensor) -> tuple[Tensor, Tensor]:
    """fn(rows [V, V], ids [V]) -> [V], called with a copy of the policy per token: (values [V], gradients [V, V])."""
    rows = logits.detach().repeat(len(logits), 1).requires_grad_()
    values = fn(rows, torch.arange(len(logits)))
    if not values.requires_grad:
        return values, torch.zeros_like(rows)
    (gradients,) = torch.autograd.grad(values.sum(), rows)
    return values.detach(), gradients


def expected(fn: Callable[[Tensor, Tensor], Tensor], logits: Tensor, sampler: Tensor) -> tuple[Tensor, Tensor]:
    """Expected value and expected gradient (the weights are not differentiated) for tokens from softmax(sampler)."""
    values, gradients = every_token(fn, logits)
    w = torch.softmax(sampler, -1)
    return w @ values, w @ gradients


def scores(logits: Tensor) -> Tensor:
    """Row v: grad log p(v) in the logits."""
    return torch.eye(len(logits), dtype=torch.float64) - torch.softmax(logits, -1)


def as_reward(fn: Callable[[Tensor, Tensor], Tensor], logits: Tensor) -> Tensor:
    """The policy gradient E_p[value * s] of fn as a detached reward."""
    values, _ = every_token(fn, logits)
    return torch.softmax(logits, -1) @ (values.unsqueeze(-1) * scores(logits))


# --- a tabular autoregressive model: 3 tokens, 3 steps, one row of logits per prefix --------------------------------

TOKENS, STEPS = 3, 3
SEQUENCES = torch.tensor(list(itertools.product(range(TOKENS), repeat=STEPS)))  # [27, 3]
# The row of the table a sequence reads at each step: (), then (a), then (a, b).
ROWS = torch.stack(
    [
        torch.zeros(len(SEQUENCES), dtype=torch.long),
        1 + SEQUENCES[:, 0],
        1 + TOKENS + TOKENS * SEQUENCES[:, 0] + SEQUENCES[:, 1],
    ],
    dim=1,
)
PREFIXES = 1 + TOKENS + TOKENS**2


def tabular(seed: int = 0, spread: float = 0.7) -> tuple[Tensor, Tensor]:
    """Tables [13, 3] of a policy and of a reference."""
    gen = torch.Generator().manual_seed(seed)
    theta = torch.randn(PREFIXES, TOKENS, generator=gen, dtype=torch.float64)
    return theta, theta + spread * torch.randn(PREFIXES, TOKENS, generator=gen, dtype=torch.float64)


def sequence_logits(tables: Tensor) -> Tensor:
    """Logits [27, 3, 3] along every sequence, from one table [13, 3] or a table per sequence [27, 13, 3]."""
    if tables.dim() == 2:
        return tables[ROWS]
    return tables[torch.arange(len(SEQUENCES)).unsqueeze(-1), ROWS]


def sequence_logps(tables: Tensor) -> Tensor:
    """log p of every token of every sequence, [27, 3]."""
    return torch.log_softmax(sequence_logits(tables), -1).gather(-1, SEQUENCES.unsqueeze(-1)).squeeze(-1)


def sequence_probabilities(tables: Tensor) -> Tensor:
    return sequence_logps(tables).sum(-1).exp()


def sequence_kl(tables: Tensor, ref_tables: Tensor) -> Tensor:
    """KL over whole sequences of the first table from the second, by its definition."""
    total = sequence_logps(tables).sum(-1)
    return (total.exp() * (total - sequence_logps(ref_tables).sum(-1))).sum()


def every_sequence(fn: Callable[[Tensor], Tensor], tables: Tensor) -> tuple[Tensor, Tensor]:
    """fn(a table per sequence [27, 13, 3]) -> [27]: (values [27], gradients [27, 13, 3])."""
    copies = tables.detach().expand(len(SEQUENCES), -1, -1).clone().requires_grad_()
    values = fn(copies)
    (gradients,) = torch.autograd.grad(values.sum(), copies)
    return values.detach(), gradients


def mean_and_variance(gradients: Tensor, tables: Tensor) -> tuple[Tensor, Tensor]:
    """Exact mean [13, 3] and total variance [] of a per-sequence gradient under the table's own samples."""
    w = sequence_probabilities(tables).view(-1, 1, 1)
    mean = (w * gradients).sum(0)
    return mean, (w * (gradients - mean).square()).sum()


def return_to_go(rewards: Tensor) -> Tensor:
    """sum_{j>=t} reward_j."""
    return rewards.flip(-1).cumsum(-1).flip(-1)


# --- controllers -----------------------------------------------------------------------------------------------------


def ziegler(coef: float, target: float, horizon: float, observations: list[tuple[float, int]]) -> list[float]:
    """The coefficient after each (sequence KL, episodes)."""
    history = []
    for kl, episodes in observations:
        error = kl / target - 1
        error = 0.2 if error > 0.2 else -0.2 if error < -0.2 else error
        coef = coef * (1 + error * episodes / horizon)
        history.append(coef)
    return history
