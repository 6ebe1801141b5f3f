"""The champion behind HTTP, on Ray Serve."""

from facm_platform.serving.config import ServeConfig
from facm_platform.serving.plan import prepare

__all__ = ["ServeConfig", "prepare"]
