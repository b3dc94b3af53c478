"""Teaching a reader and measuring it: fine-tuning, metrics, quantization."""

__all__: list[str] = []
