"""What stops a run."""

from __future__ import annotations


class NotFinite(ValueError):
    """A loss, or a parameter, is no number; the last checkpoint is whole."""
