"""FACM in pure PyTorch: interpolant, objectives, Chain-JVP, models, samplers, metrics.

Time convention, everywhere: ``t = 0`` is noise, ``t = 1`` is data.
"""
