"""What the web UI notebook's cells show."""

__all__: list[str] = []
