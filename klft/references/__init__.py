"""References: what the policy must stay close to."""

from klft.references.adapter import AdapterReference, why_base_moves
from klft.references.frozen import FrozenReference
from klft.references.protocol import Reference, resolve_reference

__all__ = ["AdapterReference", "FrozenReference", "Reference", "resolve_reference", "why_base_moves"]
