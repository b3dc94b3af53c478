"""What a stage trains, and how: base model, caches, randomness, loss, optimizer, LoRA, class images."""

__all__: list[str] = []
