"""Search over the values of a distillation's recipe, on Ray Tune."""

from facm_platform.search.config import SearchConfig
from facm_platform.search.plan import SearchPlan
from facm_platform.search.prepare import prepare

__all__ = ["SearchConfig", "SearchPlan", "prepare"]
