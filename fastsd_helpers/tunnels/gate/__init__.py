"""The login gate: a reverse proxy that lets only those with the password through."""
