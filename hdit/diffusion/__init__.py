"""Noise schedules, preconditioning, losses and samplers of the diffusion models."""

from . import noise, preconditioning, samplers

__all__ = ["noise", "preconditioning", "samplers"]
