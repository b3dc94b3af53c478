"""What the handwriting notebook's cells show."""

__all__: list[str] = []
