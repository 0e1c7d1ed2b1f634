"""Noise schedules, preconditioning, losses and samplers of the diffusion models."""

from . import diffusers_scheduler, guidance, losses, noise, preconditioning, samplers, schedules

__all__ = ["diffusers_scheduler", "guidance", "losses", "noise", "preconditioning", "samplers", "schedules"]
