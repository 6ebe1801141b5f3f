"""Jacobian-vector products through a network, block by block."""

from facm_core.jvp.chain import anchored_jvp, chain_jvp
from facm_core.jvp.rules import TangentError, tangent_rule

__all__ = ["TangentError", "anchored_jvp", "chain_jvp", "tangent_rule"]
