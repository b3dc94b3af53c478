"""Files of tensors: safetensors and .ckpt read and written, dtypes, the stream between them."""

__all__: list[str] = []
