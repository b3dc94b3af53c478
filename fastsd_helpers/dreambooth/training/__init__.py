"""What a stage trains, and how: base model, caches, randomness, loss, optimizer, LoRA."""

__all__: list[str] = []
