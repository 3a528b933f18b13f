"""Serves a model over HTTP in OpenAI's form: one process, one engine, streams, limits and metrics."""
