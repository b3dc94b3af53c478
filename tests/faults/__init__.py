"""Faults: trainings that are killed, damaged or stopped, and what becomes of them."""
