"""A web UI's code at pinned commits, and the extensions its owner adds."""

__all__: list[str] = []
