"""The state of a reference that follows the policy, in a training checkpoint."""

from pathlib import Path

from safetensors.torch import load_file, save_file

from klft.references.protocol import Reference

REFERENCE_FILE = "klft/reference.safetensors"  # not beside the model, where vLLM reads every *.safetensors


def save_reference(folder: Path, reference: Reference) -> None:
    """Write what a reference that moves needs to continue; nothing for one that does not."""
    if tensors := reference.state_dict():
        (folder / REFERENCE_FILE).parent.mkdir(parents=True, exist_ok=True)
        save_file({name: t.contiguous() for name, t in tensors.items()}, folder / REFERENCE_FILE)


def load_reference(folder: Path, reference: Reference) -> None:
    """Read it back. ValueError where the run had a reference that moved and this one does not, or the other way."""
    moves, moved = bool(reference.state_dict()), (folder / REFERENCE_FILE).exists()
    if moves != moved:
        was, now = ("moves" if each else "does not move" for each in (moved, moves))
        raise ValueError(
            f"cannot resume from {folder}: its run's reference {was}, and {reference.name} {now}. Pass the same kind"
        )
    if moves:
        reference.load_state_dict(load_file(folder / REFERENCE_FILE))
