"""Measures a model through its engine: passes of the vision tower, prefill, decode, and serving under load."""
