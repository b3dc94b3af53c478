"""Small programs and patches that run inside a web UI's own process, with the standard library alone."""
