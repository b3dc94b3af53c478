"""From photos to a prepared data set: crops, prompts, captions, and the report on them."""

__all__: list[str] = []
