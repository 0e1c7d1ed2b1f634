"""Noise schedules, preconditioning, losses and samplers of the diffusion models."""

from . import likelihood, losses, preconditioning, schedules

__all__ = ["likelihood", "losses", "preconditioning", "schedules"]
