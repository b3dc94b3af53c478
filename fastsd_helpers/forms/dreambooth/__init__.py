"""What the DreamBooth notebook's cells show."""

__all__: list[str] = []
