"""Exact KL, entropies and log-probabilities from hidden states, without ever holding the logits.

Shapes:  N tokens of this process   n tokens of a tile   V vocabulary   v vocabulary rows of this process
         D hidden size of the policy   E of the reference   K vocabulary blocks   M models (the policy, the reference)

                      vocabulary, V rows
              | shard of rank 0, v rows | shard of rank 1 | ...      shard: the rows that live on a process
              +-------+-------+---------+-------+---------+
    chunk 0   | block | block |  block  | block |  block  |          chunk: n tokens worked on together
              +-------+-------+---------+-------+---------+          tile:  a chunk's logits [n, v], one per model
    chunk 1   | block | block |  block  | block |  block  |          block: the part of a tile that is in the cache
     ...      +-------+-------+---------+-------+---------+                 while it is multiplied, read and sent back

One tile per model exists at a time. `api` checks what the user gave, `functions` are the torch.autograd.Functions,
`plan` cuts tokens and vocabulary, `collectives` is what ranks say to each other, `tile` makes the logits of a chunk and
reads values off them, `gradients` takes a logit gradient back through the head. `model_side` is one model's matrix
products; `torch_backend` and `triton_backend` do the elementwise work of a block. How a gradient travels from a tile
over two ranks: docs/fused.md.

Source of the idea of tiles: Cut Cross-Entropy, arXiv 2411.09009.
"""

from klft.fused.api import as_head as as_head
from klft.fused.api import fused_token_loss, linear_divergence, token_scores
from klft.scores import TokenScores

__all__ = ["TokenScores", "fused_token_loss", "linear_divergence", "token_scores"]
