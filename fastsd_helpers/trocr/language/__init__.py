"""What is known of the text before it is read: which characters it may have."""

__all__: list[str] = []
