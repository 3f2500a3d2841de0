"""One model of the pair: its matrix products, from hidden states to the logits of a vocabulary block and back."""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from klft.heads import LMHead


class ModelSide:
    """Hidden states [N, D] and this process's rows of the head [v, D], in the dtype they are multiplied in on a GPU.

    acc_dtype: what products are accumulated in, and logits held in: fp32, or fp64 where the policy's hidden states or
    weight are; the reference takes the policy's.
    """

    def __init__(
        self, hidden: Float[Tensor, "N D"], head: LMHead, temperature: float, acc_dtype: torch.dtype | None = None
    ):
        device = hidden.device.type
        self.dtype = torch.promote_types(hidden.dtype, head.weight.dtype)
        if torch.is_autocast_enabled(device) and self.dtype != torch.float64:
            self.dtype = torch.get_autocast_dtype(device)
        self.acc_dtype = acc_dtype or (torch.float64 if self.dtype == torch.float64 else torch.float32)
        self.hidden = hidden.detach().to(self.dtype)
        self.weight = head.weight.detach().to(self.dtype)
        self.bias = None if head.bias is None else head.bias.detach().to(self.acc_dtype)
        self.scale, self.softcap, self.temperature = head.scale, head.softcap, temperature
        # A GPU multiplies 16-bit factors into fp32. Elsewhere both are upcast, one block of the weight at a time.
        self._mixed = hidden.is_cuda and self.dtype.itemsize == 2 and self.acc_dtype == torch.float32
        self._buffer: Tensor | None = None

    @property
    def logit_scale(self) -> float:
        """scale / temperature: d logit / d (hidden @ weight.T), without the softcap's own derivative."""
        return self.scale / self.temperature

    def tile(self, n: int, vocab_major: bool) -> Float[Tensor, "n v"]:
        """Uninitialised logits [n, v], in the same memory at every call.

        vocab_major: laid out as [v, n], so that a vocabulary block is one contiguous piece, which a CPU multiplies
        faster.
        """
        rows = len(self.weight)
        buffer = self._buffer
        if buffer is None or buffer.numel() < n * rows:
            self._buffer = buffer = torch.empty(n * rows, dtype=self.acc_dtype, device=self.hidden.device)
        flat = buffer[: n * rows]
        return flat.view(rows, n).t() if vocab_major else flat.view(n, rows)

    def free(self) -> None:
        """Release the tile's memory."""
        self._buffer = None

    def operand(self, hidden: Float[Tensor, "n D"]) -> Float[Tensor, "n D"]:
        """Hidden states of a tile in the dtype in which they are multiplied."""
        return hidden if self._mixed else hidden.to(self.acc_dtype)

    def logits_(self, hidden: Float[Tensor, "n D"], rows: slice, z: Float[Tensor, "n rows"]) -> None:
        """Write the logits of some vocabulary rows into z [n, rows]; hidden [n, D] as `operand` gives it."""
        # Without a softcap, fold scale / temperature into the GEMM's alpha.
        alpha = 1.0 if self.softcap else self.logit_scale
        if self._mixed:
            product: Any = z if z.is_contiguous() else torch.empty_like(z, memory_format=torch.contiguous_format)
            options: Any = {"beta": 0, "alpha": alpha, "out_dtype": torch.float32, "out": product}
            torch.addmm(product, hidden, self.weight[rows].t(), **options)
            if product is not z:
                z.copy_(product)
        else:
            torch.addmm(z, hidden, self.weight[rows].to(self.acc_dtype).t(), beta=0, alpha=alpha, out=z)
        if self.bias is not None:
            z.add_(self.bias[rows], alpha=alpha)
        if self.softcap:
            z.mul_(self.scale / self.softcap).tanh_().mul_(self.softcap / self.temperature)

    def softcap_grad(
        self, z: Float[Tensor, "n rows"], row_max: Float[Tensor, "n"] | None
    ) -> Float[Tensor, "n rows"] | None:
        """Derivative of the softcap [n, rows], from logits z, shifted by row_max [n] if given. None without one."""
        if not self.softcap:
            return None
        tanh = (z if row_max is None else z + row_max[:, None]) * (self.temperature / self.softcap)
        return tanh.square_().neg_().add_(1)

    def grad_weight_(
        self, grad: Float[Tensor, "rows D"], dz: Float[Tensor, "n rows"], hidden: Float[Tensor, "n D"], beta: int
    ) -> None:
        """grad [rows, D] = beta * grad + dz.T @ hidden; with beta 0 it is not read."""
        if self._mixed:
            options: Any = {"beta": beta, "out_dtype": torch.float32, "out": grad}
            torch.addmm(grad, dz.t(), hidden, **options)
        else:
            grad.addmm_(dz.t(), hidden, beta=beta)

    def grad_hidden(
        self, so_far: Float[Tensor, "n D"] | None, dz: Float[Tensor, "n rows"], rows: slice
    ) -> Float[Tensor, "n D"]:
        """so_far [n, D] (None: zeros) plus dz @ weight[rows]."""
        if self._mixed:
            product = torch.mm(dz, self.weight[rows], out_dtype=torch.float32)  # pyright: ignore
            return product if so_far is None else so_far.add_(product)
        weight = self.weight[rows].to(self.acc_dtype)
        return torch.mm(dz, weight) if so_far is None else so_far.addmm_(dz, weight)

    @property
    def factor_dtype(self) -> torch.dtype:
        """The dtype in which dz = d loss / d (hidden @ weight.T) is multiplied."""
        return self.dtype if self._mixed else self.acc_dtype
