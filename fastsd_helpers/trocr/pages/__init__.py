"""Images to read: files, PDFs, and the lines of whole pages."""

__all__: list[str] = []
