"""Evaluation: numbers that carry their protocol, and pictures for the eye."""

from facm_platform.evaluation.measured import Score
from facm_platform.evaluation.protocol import Protocol
from facm_platform.evaluation.report import EvaluationResult

__all__ = ["EvaluationResult", "Protocol", "Score"]
