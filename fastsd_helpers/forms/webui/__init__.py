"""What the web UI notebook's cells show."""
