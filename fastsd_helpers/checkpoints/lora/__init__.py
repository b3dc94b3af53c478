"""LoRA and its relatives: names, layouts, strength, and what each layer changes."""

__all__: list[str] = []
