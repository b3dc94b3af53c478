"""Files of tensors: safetensors and .ckpt read and written, number formats, the stream between them."""
