"""The model's network: a checkpoint opened, engines that run it, and the search for text."""

__all__: list[str] = []
