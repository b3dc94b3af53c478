"""Widgets that all notebooks share."""

__all__: list[str] = []
