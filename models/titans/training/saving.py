"""Tensors of a run on disk, there whole or as they were."""

from pathlib import Path

import torch

from titans.files import replacing


def save_whole(fields: dict[str, object], path: Path) -> None:
    """Keep what `torch.load` reads, as `replacing` does. Raises OSError."""
    with replacing(path) as file:
        try:
            torch.save(fields, file)
        except RuntimeError as error:  # of a file that it could not end, whatever was wrong with it
            if isinstance(error.__context__, OSError):
                raise error.__context__ from None
            raise
