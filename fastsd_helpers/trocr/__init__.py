"""Read handwriting with TrOCR: open any checkpoint, read lines and pages, measure, fine-tune, quantize.

from fastsd_helpers.trocr import Reader
for line in Reader("trocr-base-handwritten").read("folder-with-lines"):
    print(line.text, line.confidence)
"""

from fastsd_helpers.trocr.model.line import Line, Token
from fastsd_helpers.trocr.reading.reader import Reader
from fastsd_helpers.trocr.reading.settings import ReadConfig

__all__ = ["Line", "ReadConfig", "Reader", "Token"]
