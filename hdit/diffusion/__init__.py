"""Noise schedules, preconditioning, losses and samplers of the diffusion models."""

from . import guidance, losses, noise, preconditioning, samplers, schedules

__all__ = ["guidance", "losses", "noise", "preconditioning", "samplers", "schedules"]
