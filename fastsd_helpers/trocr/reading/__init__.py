"""Reading: the Reader, folders of any size, reading sessions, the shared page."""
