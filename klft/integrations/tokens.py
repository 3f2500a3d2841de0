"""The tokens of a trainer's own batches, as tables and a page (`measure_every`)."""

import torch
from jaxtyping import Float
from torch import Tensor

from klft.diagnostics.tables import TrainerTables
from klft.integrations.batch import Batch, rows_of
from klft.masked import scatter_masked
from klft.scores import TokenScores


class TokenTables(TrainerTables):
    """Every n-th step's tokens: whole texts, in the order of the batch."""

    def add(self, step: int, batch: Batch, scores: TokenScores, weight: Float[Tensor, "N"] | None) -> None:
        """A micro-batch: scores [N], or [N, k], of the tokens that count, and how much; the others are to be read."""
        real = batch.real
        numbers = torch.unique_consecutive(batch.sequence[real], return_inverse=True)[1]
        rows = rows_of(numbers)

        def in_rows(t: Tensor) -> Tensor:
            return scatter_masked(t[real], rows)

        counted = in_rows(batch.counted)
        values = {name: in_rows(scatter_masked(t.detach(), batch.counted)) for name, t in scores.items()}
        # What is given before the first counted token. A text's first token is no prompt where it has a label.
        prompt = in_rows(batch.given) & (counted.cumsum(1) == 0)
        sampled = counted if batch.sampled else torch.zeros_like(counted)
        self.log.add(
            TokenScores(**values | {"sampled": sampled}), in_rows(batch.token_ids), rows, step=step, is_prompt=prompt,
            scored=counted, weights=None if weight is None else in_rows(scatter_masked(weight, batch.counted)),
        )  # fmt: skip
