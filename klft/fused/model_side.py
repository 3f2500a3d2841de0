"""One model's side of a tile: logits of a slice of the vocabulary, and a logit gradient back through its head."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


class Side:
    """One model: hidden states -> logits of the rows that live here, and a logit gradient back to its inputs."""

    def __init__(self, hidden: Tensor, head: Any, temperature: float, wide: torch.dtype | None = None):
        device = hidden.device.type
        self.dtype = torch.promote_types(hidden.dtype, head.weight.dtype)
        if torch.is_autocast_enabled(device) and self.dtype != torch.float64:
            self.dtype = torch.get_autocast_dtype(device)
        self.wide = wide or (torch.float64 if self.dtype == torch.float64 else torch.float32)
        self.hidden = hidden.detach().to(self.dtype)
        self.weight = head.weight.detach().to(self.dtype)
        self.bias = None if head.bias is None else head.bias.detach().to(self.wide)
        self.scale, self.softcap, self.temperature = head.scale, head.softcap, temperature
        # A GPU multiplies 16 bits into 32; elsewhere both factors are widened, a slice at a time.
        self._mixed = hidden.is_cuda and self.dtype.itemsize == 2 and self.wide == torch.float32
        self._buffer: Tensor | None = None

    @property
    def factor(self) -> float:
        """d (logit before the softcap's bend) / d (hidden @ weight.T)."""
        return self.scale / self.temperature

    def tile(self, n: int, sliced: bool) -> Tensor:
        """Room for logits [n, rows], the same at every call. If sliced, n of them for one row of the vocabulary after
        another: a slice is then one piece of memory, and a CPU makes it faster.
        """
        rows = len(self.weight)
        buffer = self._buffer
        if buffer is None or buffer.numel() < n * rows:
            self._buffer = buffer = torch.empty(n * rows, dtype=self.wide, device=self.hidden.device)
        flat = buffer[: n * rows]
        return flat.view(rows, n).t() if sliced else flat.view(n, rows)

    def free(self) -> None:
        """Give the tile's memory back."""
        self._buffer = None

    def operand(self, hidden: Tensor) -> Tensor:
        """Hidden states as logits and back take them."""
        return hidden if self._mixed else hidden.to(self.wide)

    def logits(self, hidden: Tensor, rows: slice, z: Tensor) -> None:
        """[n, D] -> z [n, some rows of the vocabulary]."""
        # The scale rides along in the product where nothing bends the logits after it.
        alpha = 1.0 if self.softcap else self.factor
        if self._mixed:
            out = z if z.is_contiguous() else None
            product = torch.mm(hidden, self.weight[rows].t(), out_dtype=torch.float32, out=out)  # pyright: ignore
            torch.mul(product, alpha, out=z)
        else:
            torch.addmm(z, hidden, self.weight[rows].to(self.wide).t(), beta=0, alpha=alpha, out=z)
        if self.bias is not None:
            z.add_(self.bias[rows], alpha=alpha)
        if self.softcap:
            z.mul_(self.scale / self.softcap).tanh_().mul_(self.softcap / self.temperature)

    def back(self, dz: Tensor, rows: slice, hidden: Tensor, grads: "Gradients", dh: Tensor | None) -> Tensor | None:
        """Add to these rows' gradient, and to dh [n, D], hidden's (None: to nothing yet)."""
        if grads.bias is not None:
            grads.bias[rows].add_(dz.sum(0))
        if self._mixed:
            dz = dz.to(self.dtype)
        if grads.weight is not None:
            of_rows = grads.weight[rows]
            if self._mixed:
                torch.addmm(of_rows, dz.t(), hidden, out_dtype=torch.float32, out=of_rows)  # pyright: ignore
            else:
                if grads.fresh:
                    of_rows.zero_()
                of_rows.addmm_(dz.t(), hidden)
        if grads.hidden is None:
            return None
        if self._mixed:
            return torch.mm(dz, self.weight[rows], out_dtype=torch.float32)  # pyright: ignore
        part = self.weight[rows].to(self.wide)
        return torch.mm(dz, part) if dh is None else dh.addmm_(dz, part)


@dataclass
class Gradients:
    """Accumulated in fp32 (fp64 for fp64) over the tiles; None where nobody asks."""

    hidden: Tensor | None
    weight: Tensor | None
    bias: Tensor | None
    fresh: bool  # the weight's is unwritten memory, zeroed slice by slice as it is first used
