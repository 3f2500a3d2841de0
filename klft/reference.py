"""The names of klft 0.1; see klft.references and klft.models."""

from klft._deprecated import moved

_IN_MODELS = ("VocabularyCut", "causal_inputs", "evaluating", "require_causal_lm", "vocab_size")

__getattr__ = moved(
    __name__,
    {"AdapterReference": "klft.references", "FrozenReference": "klft.references"}
    | dict.fromkeys(_IN_MODELS, "klft.models"),
)
