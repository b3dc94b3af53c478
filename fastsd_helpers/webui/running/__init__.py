"""A web UI that runs: its command, process, link, and why it ended."""

__all__: list[str] = []
