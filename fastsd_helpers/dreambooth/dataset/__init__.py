"""From photos to a prepared dataset: crops, prompts, captions, and the report on them."""

__all__: list[str] = []
