"""Bring models onto this machine: `fetch_repo` a whole, checked repository of the Hub, `fetch` one checked file.

Of a repository only the wanted files are fetched, every byte is compared with the Hub's own hashes, and a copy fetched
before is used (and named) when the Hub cannot be asked. A file comes from the Hub, CivitAI, Google Drive, GitHub or any
address, and goes on where it was stopped.
"""

from fastsd_helpers.downloads.content import describe_content
from fastsd_helpers.downloads.files import Wanted, fetch, fetch_all, models_folder, wanted_file
from fastsd_helpers.downloads.hub import fetch_repo
from fastsd_helpers.downloads.links import HubFile, holds_secret, is_link
from fastsd_helpers.downloads.pipeline import model_hash, pick_weights, read_json, require_pipeline, variant_of
from fastsd_helpers.downloads.table import models_table

__all__ = [
    "HubFile",
    "Wanted",
    "describe_content",
    "fetch",
    "fetch_all",
    "fetch_repo",
    "holds_secret",
    "is_link",
    "model_hash",
    "models_folder",
    "models_table",
    "pick_weights",
    "read_json",
    "require_pipeline",
    "variant_of",
    "wanted_file",
]
