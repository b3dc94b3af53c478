"""Pages that were read, as the files archives use: ALTO, PAGE, hOCR, searchable PDF, and plain text and tables."""

__all__: list[str] = []
