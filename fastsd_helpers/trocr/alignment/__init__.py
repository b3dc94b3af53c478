"""Pages whose whole text is known, as lines of ground truth."""

__all__: list[str] = []
