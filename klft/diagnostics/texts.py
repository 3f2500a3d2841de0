"""The names of klft 0.1; see klft.diagnostics.vocabulary."""

from klft._deprecated import moved

_MOVED = ("BYTE_OF", "TOKEN_CLASSES", "token_classes", "token_texts", "tokenizer_hash")

__getattr__ = moved(__name__, dict.fromkeys(_MOVED, "klft.diagnostics.vocabulary"))
