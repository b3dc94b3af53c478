"""Reading: the Reader, folders of any size, reading sessions, the shared page."""

__all__: list[str] = []
