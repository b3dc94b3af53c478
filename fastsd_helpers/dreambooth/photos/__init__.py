"""A user's photos as they are found: folders, zips, uploads, decoded and told apart."""

__all__: list[str] = []
