"""Finds out what works on this machine: versions, device, compiled part, every kernel, and one answer."""
