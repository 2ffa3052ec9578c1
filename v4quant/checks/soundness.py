"""The gate in front of verbs that run or measure a checkpoint."""

from __future__ import annotations

from v4quant_formats.checkpoint import Checkpoint
from v4quant_formats.manifest import MANIFEST_NAME, ManifestError, read_manifest
from v4quant_formats.structure import check_structure


def require_sound(*checkpoints: Checkpoint) -> None:
    """Raise the first structural defect, as its own error, before any work begins.

    Tensors that no V4 release has may be in what `quantize --unknown copy` wrote, and only there.
    """
    for checkpoint in checkpoints:
        check_structure(checkpoint, unknown_of(checkpoint))


def unknown_of(checkpoint: Checkpoint) -> str:
    """What the conversion that wrote a checkpoint was told about unknown tensors."""
    if not (checkpoint.path / MANIFEST_NAME).is_file():
        return "refuse"
    try:
        recipe = read_manifest(checkpoint.path).get("recipe")
    except ManifestError:
        return "refuse"
    said = recipe.get("unknown") if isinstance(recipe, dict) else None
    return "copy" if said == "copy" else "refuse"
