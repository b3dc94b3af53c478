"""The services that make public links, and the programs they need."""

__all__: list[str] = []
