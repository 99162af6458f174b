"""Reading and writing model directories."""

from .base import CheckpointError
from .reader import Checkpoint, open_checkpoint
from .save import save_packed

__all__ = ["Checkpoint", "CheckpointError", "open_checkpoint", "save_packed"]
