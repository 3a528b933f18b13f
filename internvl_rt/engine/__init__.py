"""Answers requests: the engine, its asyncio form, and the loop of steps under both."""

from internvl_rt.engine.async_engine import AsyncEngine
from internvl_rt.engine.engine import Engine

__all__ = ["AsyncEngine", "Engine"]
