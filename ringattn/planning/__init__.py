"""Masks, layouts, schedules and plans: NumPy only, nothing here knows torch."""
