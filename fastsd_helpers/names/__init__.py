"""The letters a name or a text is written in, where it does not say so."""

__all__: list[str] = []
