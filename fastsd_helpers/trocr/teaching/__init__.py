"""Teaching a reader and measuring it: fine-tuning, metrics, quantization."""
