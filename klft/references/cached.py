"""Hidden states of a reference over fixed data, written once: exact KLs later, without its body in memory.

    batches = ((b["input_ids"], b["attention_mask"]) for b in loader)
    CachedReference.write("cache/", FrozenReference(big_model), batches, tokenizer=tokenizer)
    penalty = KLPenalty(CachedReference("cache/", tokenizer=tokenizer), estimator="exact", placement="loss")

A folder holds `hidden-*.safetensors` (a tensor [n, D] per text, named by the hash of its token ids), `head.safetensors`
and, written last, `index.json`.
"""

import hashlib
import json
from collections.abc import Iterable
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Float, Int
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from klft.heads import LMHead
from klft.models import tokenizer_hash
from klft.references.protocol import Reference
from klft.writing import atomic_write, check_unused, one_line

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SHARD_BYTES = 1 << 30


def _hash(value: bytes) -> str:
    return hashlib.blake2b(value, digest_size=16).hexdigest()


def _text_hash(ids: Int[Tensor, "n"]) -> str:
    return _hash(ids.long().numpy().tobytes())


class CachedReference(Reference):
    """A reference over the texts of a folder that `write` filled: no other text is known to it.

    A text is its real tokens, wherever padding stands, and from its first token on: what is cut elsewhere is another
    text. Hidden states keep their dtype and are mapped from disk, not loaded.

    Args:
        path: the folder.
        tokenizer: if given, it must have the vocabulary of the one given to `write`.

    Raises ValueError for a folder that is not whole (the file is named), for another tokenizer, and in use for a text
    that is not in the folder.
    """

    fixed_text = "it knows the texts it was written from"

    def __init__(self, path: str | PathLike, tokenizer: "PreTrainedTokenizerBase | None" = None):
        self.path = Path(path)
        try:
            self._index: dict[str, Any] = json.loads((self.path / "index.json").read_text())
        except (OSError, ValueError) as error:
            raise ValueError(f"CachedReference: {self.path} has no readable index.json: write it anew") from error
        for name, size in self._index["files"].items():
            found = (self.path / name).stat().st_size if (self.path / name).is_file() else 0
            if found != size:
                raise ValueError(f"CachedReference: {self.path / name} has {found} bytes instead of {size}")
        if tokenizer is not None and tokenizer_hash(tokenizer) != self._index["tokenizer"]:
            raise ValueError(f"CachedReference: {self.path} was written with another tokenizer, or with none")
        self._head = LMHead(**load_file(self.path / "head.safetensors"), **self._index["head"])
        shards = [safe_open(self.path / name, "pt") for name in self._index["files"] if name.startswith("hidden")]
        self._shard_of = {key: shard for shard in shards for key in shard.keys()}  # noqa: SIM118 - no mapping

    @classmethod
    def write(
        cls, path: str | PathLike, reference: Reference, batches: Iterable[tuple[Tensor, Tensor]],
        *, tokenizer: "PreTrainedTokenizerBase | None" = None,
    ) -> "CachedReference":  # fmt: skip
        """Fill the new folder `path` with hidden states of `batches`, (input_ids, attention_mask) [B, T] each.

        Equal texts are written once. Raises ValueError for a folder that is in use and for no batch, TypeError where
        the reference's head cannot be read.
        """
        folder = Path(path)
        check_unused(folder, ("index.json", "*.safetensors"), "Name another folder, or remove it.")
        folder.mkdir(parents=True, exist_ok=True)
        held: dict[str, Tensor] = {}
        seen, names, head = set(), [], None

        def flush() -> None:
            names.append(f"hidden-{len(names):05d}.safetensors")
            save_file(held, folder / names[-1])
            held.clear()

        for input_ids, attention_mask in batches:
            hidden, head = reference.hidden(input_ids, attention_mask)
            for ids, mask, states in zip(input_ids.cpu(), attention_mask.cpu() != 0, hidden.cpu(), strict=True):
                if (key := _text_hash(ids[mask])) not in seen:
                    seen.add(key)
                    held[key] = states[mask]
            if sum(t.nbytes for t in held.values()) >= SHARD_BYTES:
                flush()
        if head is None or head.shard is not None:
            raise ValueError("CachedReference.write: there is no batch, or the head is split over processes")
        if held:
            flush()
        tensors = {name: getattr(head, name) for name in ("weight", "bias") if getattr(head, name) is not None}
        save_file({k: t.detach().cpu().contiguous() for k, t in tensors.items()}, folder / "head.safetensors")
        index = {
            "name": reference.name, "max_positions": reference.max_positions,
            "tokenizer": None if tokenizer is None else tokenizer_hash(tokenizer),
            "head": {"scale": head.scale, "softcap": head.softcap},
            "files": {name: (folder / name).stat().st_size for name in [*names, "head.safetensors"]},
        }  # fmt: skip
        with atomic_write(folder / "index.json") as file:
            file.write(json.dumps(index, indent=1).encode())
        return cls(folder, tokenizer)

    @one_line
    def __repr__(self) -> str:
        return f"{self._index['name']!r} in {str(self.path)!r}, {len(self._shard_of)} texts, {self._head!r}"

    @property
    def name(self) -> str:
        """That of the reference it was written from."""
        return f"{self._index['name']} (cached in {self.path})"

    @property
    def vocab_size(self) -> int:
        """Rows of the head."""
        return self._head.vocab_size

    @property
    def max_positions(self) -> int | None:
        """That of the reference it was written from."""
        return self._index["max_positions"]

    def to(self, device: torch.device | str) -> None:
        """Move the head; hidden states follow it as they are read."""
        self._head = self._head.to(device)

    def logits(
        self, input_ids: Int[Tensor, "B T"], attention_mask: Int[Tensor, "B T"], keep: int = 0
    ) -> Float[Tensor, "B K V"]:
        """Logits of the last `keep` positions (0: all), in fp32 or fp64, on the device of input_ids; 0 at padding."""
        hidden, head = self.hidden(input_ids, attention_mask, keep)
        return head.logits(hidden).to(input_ids.device)

    def hidden(
        self, input_ids: Int[Tensor, "B T"], attention_mask: Int[Tensor, "B T"], keep: int = 0
    ) -> tuple[Float[Tensor, "B K D"], LMHead]:
        """(hidden states of the last `keep` positions, head), on the head's device; 0 at padding."""
        real = attention_mask != 0
        return self._read(input_ids, real, torch.zeros_like(real))[:, -keep:], self._head

    def hidden_of(self, inputs: dict[str, Any]) -> tuple[Float[Tensor, "B T D"], LMHead]:
        """`hidden` of a backbone's arguments, `inputs`; in packed rows a text begins where position_ids are 0.

        Raises ValueError where there is more than ids, a mask [B, T] and positions: images, embeddings, masks by pair.
        """
        ids, mask, positions = (inputs.get(name) for name in ("input_ids", "attention_mask", "position_ids"))
        more = [n for n, t in inputs.items() if isinstance(t, Tensor) and (t.is_floating_point() or t.dim() > 2)]
        if more or ids is None:
            raise ValueError(f"CachedReference: texts are found by their token ids alone, got {sorted(inputs)}")
        real = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask != 0
        starts = torch.zeros_like(real) if positions is None else (positions == 0).expand_as(real)
        return self._read(ids, real, starts), self._head

    def _read(self, ids: Int[Tensor, "B T"], real: Bool[Tensor, "B T"], starts: Bool[Tensor, "B T"]) -> Tensor:
        """Hidden states [B, T, D]; a row is one text, or several where `starts` holds after its first token."""
        device, out = self._head.weight.device, None
        ids, real, starts = ids.cpu(), real.cpu(), starts.cpu()
        for i, row in enumerate(ids):
            places = real[i].nonzero().flatten()
            for text in places.tensor_split(starts[i, places].nonzero().flatten().tolist()):
                if len(text):
                    states = self._text(row[text])
                    out = states.new_zeros(*ids.shape, states.shape[-1], device=device) if out is None else out
                    out[i, text] = states.to(device)
        return self._head.weight.new_zeros(*ids.shape, self._head.weight.shape[1]) if out is None else out

    def _text(self, ids: Int[Tensor, "n"]) -> Float[Tensor, "n D"]:
        key = _text_hash(ids)
        if key not in self._shard_of:
            raise ValueError(
                f"CachedReference: a text of {len(ids)} tokens, {ids[:4].tolist()} ..., is not in {self.path}: it was "
                "written from other data, with another tokenizer, or cut elsewhere. Write it anew from this data"
            )
        return self._shard_of[key].get_tensor(key)
