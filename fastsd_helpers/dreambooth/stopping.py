"""How a run is asked to stop; every kind of run is asked alike."""

from fastsd_helpers.processes import stop_signals

__all__ = ["stop_signals"]
