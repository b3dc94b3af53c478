"""Widgets that all notebooks share."""
