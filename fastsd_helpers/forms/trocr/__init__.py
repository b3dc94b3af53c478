"""What the handwriting notebook's cells show."""
