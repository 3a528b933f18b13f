"""Measures a model through its engine (vision, prefill, decode, serving), single kernels, and the device's roof."""
