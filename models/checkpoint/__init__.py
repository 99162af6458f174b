"""Reading and writing model directories."""

from .base import CheckpointError, quote
from .reader import Checkpoint, open_checkpoint
from .save import check_destination, new_parents, save_packed

__all__ = [
    "Checkpoint",
    "CheckpointError",
    "check_destination",
    "new_parents",
    "open_checkpoint",
    "quote",
    "save_packed",
]
