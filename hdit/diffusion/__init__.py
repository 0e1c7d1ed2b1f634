"""Noise schedules, preconditioning, losses, likelihood, samplers and guidance of the diffusion models."""

from . import diffusers_scheduler, guidance, likelihood, losses, noise, preconditioning, samplers, schedules

__all__ = [
    "diffusers_scheduler",
    "guidance",
    "likelihood",
    "losses",
    "noise",
    "preconditioning",
    "samplers",
    "schedules",
]
