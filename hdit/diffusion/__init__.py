"""Noise schedules, preconditioning, losses and samplers of the diffusion models."""

from . import losses, preconditioning, schedules

__all__ = ["losses", "preconditioning", "schedules"]
