"""The noise schedule and the samplers, all diffusers' (LD-BFR section 2.2: equation (1), LDM's "linear" betas)."""

from __future__ import annotations

from typing import Any, Protocol

from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
from diffusers.schedulers.scheduling_dpmsolver_multistep import DPMSolverMultistepScheduler
from diffusers.schedulers.scheduling_unipc_multistep import UniPCMultistepScheduler
from torch import Tensor

from ldbfr.config import DiffusionSettings, SchedulerName
from ldbfr.errors import ConfigError


class Scheduler(Protocol):
    """What sampling needs of a diffusers scheduler."""

    timesteps: Tensor

    def set_timesteps(self, num_inference_steps: int) -> None:
        """Choose the steps to visit."""

    def step(self, model_output: Tensor, timestep: Tensor, sample: Tensor) -> Any:
        """One denoising step."""


def schedule_config(settings: DiffusionSettings) -> dict[str, Any]:
    """diffusers' names for the schedule; CompVis's "linear" is `scaled_linear` there."""
    return {
        "num_train_timesteps": settings.num_train_timesteps,
        "beta_start": settings.beta_start,
        "beta_end": settings.beta_end,
        "beta_schedule": "scaled_linear",
        "prediction_type": "epsilon",
    }


def noise_schedule(settings: DiffusionSettings) -> DDPMScheduler:
    """The forward process of training, q(z_t | z_0)."""
    return DDPMScheduler(**schedule_config(settings), clip_sample=False)


def make_sampler(scheduler: SchedulerName | Scheduler, settings: DiffusionSettings) -> Scheduler:
    """A sampler by name, or the given scheduler itself.

    "dpm_solver" is DPM-Solver++ (2M), "ddpm" the ancestral sampling of equation (1).

    Raises:
        ConfigError: an unknown name.
    """
    if not isinstance(scheduler, str):
        return scheduler
    config = schedule_config(settings)
    match scheduler:
        case "ddpm":
            return DDPMScheduler(**config, clip_sample=False, timestep_spacing="trailing")
        case "ddim":
            # DDIM is DPM-Solver++ of order 1 (Lu et al. 2022, section 4.1). diffusers' own DDIMScheduler goes astray
            # where the number of steps does not divide the schedule.
            return DPMSolverMultistepScheduler(**config, solver_order=1, timestep_spacing="trailing")
        case "unipc":
            return UniPCMultistepScheduler(**config, timestep_spacing="trailing")
        case "dpm_solver":
            return DPMSolverMultistepScheduler(**config, algorithm_type="dpmsolver++", timestep_spacing="trailing")
    raise ConfigError(f"no scheduler {scheduler!r}: give dpm_solver, ddim, ddpm or unipc, or a diffusers scheduler")
