"""What comes out of a run: samples, loss curve, the verified checkpoint, the upload."""

__all__: list[str] = []
