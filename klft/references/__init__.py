"""References: what the policy must stay close to."""

from klft.references.adapter import AdapterReference, why_base_moves
from klft.references.cached import CachedReference
from klft.references.ema import EMAReference
from klft.references.frozen import FrozenReference, warn_if_one_model
from klft.references.mixture import MixtureReference
from klft.references.protocol import Reference, parts_of, resolve_reference
from klft.references.top_k import TopKReference

__all__ = [
    "AdapterReference",
    "CachedReference",
    "EMAReference",
    "FrozenReference",
    "MixtureReference",
    "Reference",
    "TopKReference",
    "parts_of",
    "resolve_reference",
    "warn_if_one_model",
    "why_base_moves",
]
