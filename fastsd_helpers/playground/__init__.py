"""A small Gradio page to try one model or session at once; also for families that no web UI here runs."""

from fastsd_helpers.playground.artist import Artist, open_artist
from fastsd_helpers.playground.page import Page, PlaygroundConfig, open_playground

__all__ = ["Artist", "Page", "PlaygroundConfig", "open_artist", "open_playground"]
