"""The name tables of the model families, and what a table is."""

__all__: list[str] = []
