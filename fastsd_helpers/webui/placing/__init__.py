"""Models where a web UI looks for them: which files it needs, found, checked, converted, linked."""

__all__: list[str] = []
