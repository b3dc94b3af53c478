"""Fine-tuning a model and measuring it: metrics, evaluation, quantization."""

__all__: list[str] = []
