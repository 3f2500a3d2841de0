"""The names of klft 0.1; see klft.diagnostics.loading."""

from klft._deprecated import moved

__getattr__ = moved(__name__, dict.fromkeys(("load_models", "quiet", "read_texts"), "klft.diagnostics.loading"))
