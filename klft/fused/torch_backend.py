"""The elementwise work of a vocabulary block in torch operations, and its schedule over CPU workers.

A block is z [n, rows], small enough to stay in a CPU core's cache, where an addition costs a tenth of a nanosecond and
a `where` ten times that: so no `where` here. What is not finite (a suppressed token), or too far from the other model
for these formulas, becomes NaN and is left to the fallback, the rows of klft.divergences, token by token.

Logits are stored shifted by their block's row max and never normalised in place: a Norm says what makes
log-probabilities of them.

A backend is a module with these functions: workspaces, block_size, for_each_block; max_and_sum_, exact_sums and
combine_sums, one_hots, gradient_factors and gradient.
"""

from collections.abc import Callable
from itertools import pairwise, repeat
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from klft.fused import workers

VOCAB_MAJOR = True  # tiles are laid out as [v, n]
SHIFTS = True  # max_and_sum_ subtracts the row max in place
KNOWS_LIMITS = False  # exact_sums is right for suppressed tokens and far tails, without the fallback
SCRATCH = 4  # intermediate results of the size of a block: fresh memory for each would cost more than the arithmetic
FAR = 60.0  # past it, p * exp(log(q/p)) has lost the digits of a p that is hardly a number any more


class Norm(NamedTuple):
    """Normalisers of a block's shifted logits z (policy) and y (reference), [n] each.

    lp = z - log_z, p = scale * exp(z); lq = y - ref_log_z, q = ref_scale * exp(y); lq - lp = (y - z) - log_z_diff, with
    one rounding where ref_log_z - log_z has two. row_max, ref_row_max: what must be subtracted from the stored logits
    first, where the backend does not shift them in place.
    """

    log_z: Tensor
    scale: Tensor
    ref_log_z: Tensor
    ref_scale: Tensor
    log_z_diff: Tensor
    row_max: Tensor | None = None
    ref_row_max: Tensor | None = None

    def by_block(self) -> "list[Norm]":
        """The norms of blocks, from the norm of all of them [K, n]."""
        columns = [repeat(None) if t is None else t.unbind(0) for t in self]
        return [Norm(*each) for each in zip(*columns, strict=False)]


class Coefficients(NamedTuple):
    """Per-token coefficients of dz, [n] each; None for 0, in terms of probabilities: Factors has them for a block.

    dz = p * (constant + lp * of_lp + (lq - lp) * of_diff) - of_ref * q.
    """

    constant: Tensor
    of_lp: Tensor | None
    of_diff: Tensor | None
    of_ref: Tensor | None


class Workspace:
    """One worker's scratch memory, and its part of the gradient of a tile's hidden states."""

    def __init__(self, device: torch.device, memory: Tensor | None = None):
        self.device, self._memory = device, memory  # memory [SCRATCH, logits of a block]
        self.grad_hidden: Tensor | None = None
        self._views: dict[torch.Size, list[Tensor]] = {}

    def scratch(self, z: Tensor, count: int) -> list[Tensor]:
        """`count` uninitialised tensors like z [n, rows], vocabulary-major; the same memory at every call."""
        if self._memory is None:
            return [torch.empty_like(z) for _ in range(count)]
        views = self._views.get(z.shape)
        if views is None:
            views = [t[: z.numel()].view(z.shape[::-1]).t() for t in self._memory]
            self._views[z.shape] = views
        return views[:count]


# ---- schedule -------------------------------------------------------------------------------------------------------


def workspaces(like: Tensor, block_logits: int) -> list[Workspace]:
    """One for each worker; `like` gives device and dtype, `block_logits` the largest block."""
    count = workers.count() if like.device.type == "cpu" else 1
    return [Workspace(like.device, like.new_empty(SCRATCH, block_logits)) for _ in range(count)]


def block_size(tokens: int, rows: int, block_logits: int) -> int:
    """Vocabulary rows of a block, for tiles of `tokens` tokens and `rows` rows: a like number of blocks per worker."""
    blocks = -(-rows // max(1, block_logits // tokens))
    if blocks > 1:
        blocks = -(-blocks // workers.count()) * workers.count()
    return max(1, -(-rows // max(1, blocks)))


def for_each_block(block_fn: Callable[[int, Workspace], None], blocks: int, spaces: list[Workspace]) -> None:
    """block_fn(i, workspace) for i in range(blocks): consecutive blocks per worker, in order, in its workspace."""
    share = -(-blocks // len(spaces))

    def work(worker: int) -> None:
        # Autocast has done its part on the inputs; it must not round what is multiplied or summed inside.
        with torch.autocast(spaces[worker].device.type, enabled=False):
            for i in range(worker * share, min((worker + 1) * share, blocks)):
                block_fn(i, spaces[worker])

    workers.each(work, range(-(-blocks // share)))


# ---- a block --------------------------------------------------------------------------------------------------------


def max_and_sum_(
    z: Float[Tensor, "n rows"], row_max: Float[Tensor, "n"], sum_exp: Float[Tensor, "n"], workspace: Workspace
) -> None:
    """z -= its row max, in place. Into row_max [n]: the max (0 where not finite); into sum_exp [n]: sum of exp(z)."""
    if z.shape[1] == 0:
        row_max.zero_()
        sum_exp.zero_()
        return
    torch.amax(z, -1, out=row_max)
    z.sub_(row_max.nan_to_num_(0.0, 0.0, 0.0)[:, None])
    (e,) = workspace.scratch(z, 1)
    torch.sum(torch.exp(z, out=e), -1, out=sum_exp)


def _gap_sum(p: Tensor, x: Tensor, e: Tensor, total: Tensor, x_max: Tensor) -> None:
    """Into total [n]: sum of the Bregman gaps p * (e^x - 1 - x), each >= 0 (less than that by rounding only)."""
    torch.sum(torch.expm1(x, out=e).sub_(x).mul_(p).relu_(), -1, out=total)
    torch.amax(x, -1, out=x_max)


def exact_sums(
    z: Float[Tensor, "n rows"],
    y: Float[Tensor, "n rows"],
    norm: Norm,
    names: tuple[str, ...],
    out: Float[Tensor, "names 2 n"],
    workspace: Workspace,
) -> None:
    """The block's part of entropy, ref_entropy, reverse_kl, forward_kl (`names`, in that order) into out [names, 2, n].

    It takes combine_sums, over all blocks at once, to make sums of it: what is of size [n] costs as much here as there.
    """
    if z.shape[1] == 0:
        out.zero_()
        return
    parts = dict(zip(names, out, strict=True))
    p, q, x, e = workspace.scratch(z, 4)
    torch.exp(z, out=p)
    if "ref_entropy" in parts or "forward_kl" in parts:
        torch.exp(y, out=q)
    for name, w, log_w in (("entropy", p, z), ("ref_entropy", q, y)):
        if name in parts:
            torch.sum(w, -1, out=parts[name][0])
            torch.sum(torch.mul(w, log_w, out=e), -1, out=parts[name][1])
    if "reverse_kl" in parts or "forward_kl" in parts:
        torch.sub(y, z, out=x).sub_(norm.log_z_diff[:, None])  # log q/p
    if "reverse_kl" in parts:
        _gap_sum(p, x, e, *parts["reverse_kl"])
    if "forward_kl" in parts:
        _gap_sum(q, x.neg_(), e, *parts["forward_kl"])


def combine_sums(parts: Float[Tensor, "K names 2 n"], norm: Norm, names: tuple[str, ...]) -> Float[Tensor, "names n"]:
    """[K, names, 2, n] of exact_sums, norm [K, n] -> [names, n], summed over blocks.

    Not finite where the fallback must see to it.
    """
    sums = []
    for name, (first, second) in zip(names, parts.permute(1, 2, 0, 3), strict=True):
        of_reference = name in ("ref_entropy", "forward_kl")
        log_z, scale = (norm.ref_log_z, norm.ref_scale) if of_reference else (norm.log_z, norm.scale)
        if name.endswith("_kl"):
            sums.append((first * scale).masked_fill_(second > FAR, torch.nan))
        else:
            # -sum w * (log w - log_z): both terms have one sign. log_z may be huge where its scale is 0.
            sums.append(first * (log_z * scale) - second * scale)
    return torch.stack(sums).sum(1)


class Factors(NamedTuple):
    """Coefficients of a block's dz in terms of its shifted logits, columns [n, 1]; see gradient_factors.

    dz = exp(z) * (one + z * of_z + (y - z) * of_diff) - exp(y) * of_ref.
    """

    one: Tensor
    of_z: Tensor | None
    of_diff: Tensor | None
    of_ref: Tensor | None


def gradient_factors(norm: Norm, coefficients: Coefficients) -> list[Factors]:
    """Factors of every block, from norm [K, n]: at once, since small operations between large ones are slow."""
    constant, of_lp, of_diff, of_ref = coefficients
    # Multiplied with the scale first: a log may be huge where its probability is 0.
    one = constant * norm.scale
    if of_lp is not None:
        one = one - of_lp * (norm.log_z * norm.scale)
    if of_diff is not None:
        one = one - of_diff * (norm.log_z_diff * norm.scale)
    of_z, of_y_z = (None if t is None else t * norm.scale for t in (of_lp, of_diff))
    of_ref = None if of_ref is None else of_ref * norm.ref_scale
    columns = [repeat(None) if t is None else t[:, :, None].unbind(0) for t in (one, of_z, of_y_z, of_ref)]
    return [Factors(*each) for each in zip(*columns, strict=False)]


class OneHot(NamedTuple):
    """What a block's gradient gets where its rows are sampled tokens: dz[tokens, rows] += g."""

    tokens: Tensor
    rows: Tensor
    g: Tensor


def one_hots(token_ids: Tensor, g: Tensor, vocab_blocks: list[slice]) -> list[OneHot]:
    """Of every block. token_ids [n]: rows of this process, anything else for tokens without a row here; g [n]."""
    ids, tokens = token_ids.sort()
    ends = torch.tensor([0, *(rows.stop for rows in vocab_blocks)], device=ids.device)
    bounds = torch.searchsorted(ids, ends).tolist()  # where each block's tokens begin and end
    parts = [slice(*bound) for bound in pairwise(bounds)]
    return [OneHot(tokens[p], ids[p] - rows.start, g[tokens[p]]) for p, rows in zip(parts, vocab_blocks, strict=True)]


def gradient(
    z: Float[Tensor, "n rows"],
    y: Float[Tensor, "n rows"],
    factors: Factors,
    one_hot: OneHot | None,
    dtype: torch.dtype,
    workspace: Workspace,
) -> Float[Tensor, "n rows"]:
    """The block's logit gradient [n, rows], in scratch memory. dtype: see triton_backend, which heeds it."""
    dz, term, diff = workspace.scratch(z, 3)
    torch.exp(z, out=dz)
    # Products and sums are taken one after the other: addcmul with a factor per row leaves the fast path.
    if factors.of_z is not None:
        torch.mul(z, dz, out=term).mul_(factors.of_z)
    if factors.of_diff is not None:
        torch.sub(y, z, out=diff).mul_(dz).mul_(factors.of_diff)
    dz.mul_(factors.one)
    if factors.of_z is not None:
        dz.add_(term)
    if factors.of_diff is not None:
        dz.add_(diff)
    if factors.of_ref is not None:
        dz.sub_(torch.exp(y, out=term).mul_(factors.of_ref))
    if one_hot is not None:
        dz.index_put_((one_hot.tokens, one_hot.rows), one_hot.g, accumulate=True)
    return dz
