"""Replicas under Ray Serve: one address with the server's interface, and routing to the cache that holds a prompt.

The names below load Ray on first use.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from internvl_rt.serve_ray.deployments import application as application
    from internvl_rt.serve_ray.deployments import build as build

__all__ = ["application", "build"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'internvl_rt.serve_ray' has no attribute {name!r}")
    from internvl_rt.serve_ray import deployments

    return getattr(deployments, name)
