"""Models are data: one look at every file of a model, before anything of it is loaded, placed or converted.

`require_inert` refuses what could run code or lead a library elsewhere: programs, pickles that name more than tensors,
parts of other libraries than diffusers and transformers, and descriptions with keys by which a library fetches code.
It reads descriptions, headers and the programs of pickles; never the weights, and it runs nothing. Libraries close such
holes version by version; this look closes them whatever version is installed.
"""

from fastsd_helpers.inert.configs import read_config
from fastsd_helpers.inert.look import require_inert

__all__ = ["read_config", "require_inert"]
