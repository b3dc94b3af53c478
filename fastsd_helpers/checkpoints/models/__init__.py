"""Whole models: a single file, a Diffusers folder and its parts, detected, written, verified, merged."""

__all__: list[str] = []
