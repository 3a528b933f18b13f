"""Measures a model through its engine: passes of the tower, prefill, decode, and serving under load."""
