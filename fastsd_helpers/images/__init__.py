"""Image files: what they are, opened within bounds, and faces in them."""

__all__: list[str] = []
