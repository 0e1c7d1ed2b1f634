"""Noise schedules, preconditioning, losses and samplers of the diffusion models."""

from . import losses, noise, preconditioning, samplers, schedules

__all__ = ["losses", "noise", "preconditioning", "samplers", "schedules"]
