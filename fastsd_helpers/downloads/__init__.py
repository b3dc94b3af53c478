"""Bring base models onto this machine: a registry key, a Hub id or a folder becomes a whole, checked Diffusers folder.

Only the files that training needs are fetched, every byte is compared with the Hub's own hashes, and a copy fetched
before is used (and named) when the Hub cannot be asked.
"""

from fastsd_helpers.downloads.base_models import fetch_model
from fastsd_helpers.downloads.hub import fetch_repo
from fastsd_helpers.downloads.pipeline import model_hash, pick_weights, read_json, require_pipeline, variant_of
from fastsd_helpers.downloads.table import models_table

__all__ = [
    "fetch_model",
    "fetch_repo",
    "model_hash",
    "models_table",
    "pick_weights",
    "read_json",
    "require_pipeline",
    "variant_of",
]
