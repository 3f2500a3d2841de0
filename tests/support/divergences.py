"""Every divergence with the parameters it is tested at, and the plain formulas in the input's own precision."""

import torch

# name, parameters: every divergence, the parametric ones at an inner and at an awkward value.
ROWS = [
    ("reverse_kl", ()),
    ("forward_kl", ()),
    ("jsd", (0.5,)),
    ("jsd", (0.1,)),
    ("jsd", (0.93,)),
    ("skew_kl", (0.1,)),
    ("skew_kl", (0.8,)),
    ("skew_reverse_kl", (0.1,)),
    ("skew_reverse_kl", (0.8,)),
    ("alpha_divergence", (0.5,)),
    ("alpha_divergence", (2.0,)),
    ("alpha_divergence", (-1.0,)),
    ("renyi_divergence", (0.5,)),
    ("renyi_divergence", (2.0,)),
]


def naive(name, logits, ref, *params):
    """The plain formula in the input's own precision."""
    lp, lq = torch.log_softmax(logits, -1), torch.log_softmax(ref, -1)
    p, q = lp.exp(), lq.exp()
    if name == "reverse_kl":
        return (p * (lp - lq)).sum(-1)
    if name == "forward_kl":
        return (q * (lq - lp)).sum(-1)
    if name == "jsd":
        (b,) = params
        lm = (b * q + (1 - b) * p).log()
        return (b * q * (lq - lm) + (1 - b) * p * (lp - lm)).sum(-1)
    (a,) = params
    if name == "skew_kl":
        return (q * (lq - (a * q + (1 - a) * p).log())).sum(-1)
    if name == "skew_reverse_kl":
        return (p * (lp - (a * p + (1 - a) * q).log())).sum(-1)
    mixed = (p**a * q ** (1 - a)).sum(-1)
    return (mixed - 1) / (a * (a - 1)) if name == "alpha_divergence" else mixed.log() / (a - 1)
