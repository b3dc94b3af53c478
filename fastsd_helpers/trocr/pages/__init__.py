"""Images to read: files, PDFs, and the lines of whole pages."""
