"""What the DreamBooth notebook's cells show."""
