"""Jacobian-vector products through a network, block by block."""

from facm_core.jvp.chain import chain_jvp

__all__ = ["chain_jvp"]
