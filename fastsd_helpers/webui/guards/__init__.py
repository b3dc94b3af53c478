"""Guarded starts: scripts that close what a list of paths cannot, then run a web UI's own launcher.

They run in the web UI's environment, where this package is not installed: only the standard library and `frame` are
imported by them. Nothing here is imported by fastsd_helpers itself.
"""

__all__: list[str] = []
