"""Noise schedules, preconditioning, losses and samplers of the diffusion models."""

from . import preconditioning

__all__ = ["preconditioning"]
