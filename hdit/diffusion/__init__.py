"""Noise schedules, preconditioning, losses, samplers, guidance and likelihood of the diffusion models."""

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
