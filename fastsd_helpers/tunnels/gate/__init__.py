"""The login gate: a reverse proxy that lets only those with the password through."""

__all__: list[str] = []
