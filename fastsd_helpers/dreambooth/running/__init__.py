"""The run as a whole: forecast, dry run, engine, child process, live view."""

__all__: list[str] = []
