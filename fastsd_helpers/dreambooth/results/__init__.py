"""What comes out of a run: samples, loss curve, the verified checkpoint, the upload."""
