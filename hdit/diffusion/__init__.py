"""Noise schedules, preconditioning, losses, samplers, guidance and likelihood of the diffusion models."""

from . import guidance, likelihood, losses, noise, preconditioning, samplers, schedules

__all__ = ["guidance", "likelihood", "losses", "noise", "preconditioning", "samplers", "schedules"]
