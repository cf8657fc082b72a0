"""The loss, and the optimiser that lowers it."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from diffusers.training_utils import compute_snr
from torch import Tensor
from torch.nn import functional as F

from ..errors import NestedAttentionError
from ..regions import by_area
from .config import LossConfig, OptimiserConfig
from .model import SubjectDenoiser
from .parallel import ShardedAdamW


def denoising_loss(
    predict: Callable[[Tensor, Tensor], Tensor],
    scheduler: Any,
    latents: Tensor,
    generators: Sequence[torch.Generator],
    options: LossConfig,
    weights: Tensor | None = None,
) -> Tensor:
    """The noise-prediction loss of a batch, a scalar in fp32.

    Args:
        predict: (noisy latents, timesteps) -> prediction, of the scheduler's prediction type.
        scheduler: diffusers' DDPMScheduler or one like it; adds the noise.
        latents: x0 (B, C, H, W).
        generators: of each row's noise and timestep, on the CPU whatever the device, so that every device has the same;
            one per row, so that a row has the same in whatever batch it is.
        options: Min-SNR weights, where wanted.
        weights: of the picture's pixels (B, H', W'), mean 1, or None.

    Raises NestedAttentionError for a prediction type that is none of noise, velocity and picture.
    """
    steps = scheduler.config["num_train_timesteps"]
    drawn = [(torch.randn(latents.shape[1:], generator=g), torch.randint(steps, (1,), generator=g)) for g in generators]
    noise = torch.stack([row for row, _ in drawn]).to(latents)
    times = torch.cat([time for _, time in drawn]).to(latents.device)
    noisy = scheduler.add_noise(latents, noise, times)
    kind = scheduler.config["prediction_type"]
    target = target_of(scheduler, latents, noise, times)
    error = F.mse_loss(predict(noisy, times).float(), target.float(), reduction="none").mean(1)  # (B, H, W)
    if weights is not None:
        error = error * by_area(weights[:, None].to(error), error.shape[1:])[:, 0]
    return (error.mean((1, 2)) * _time_weights(scheduler, times, kind, options.min_snr_gamma)).mean()


def target_of(scheduler: Any, latents: Tensor, noise: Tensor, times: Tensor) -> Tensor:
    """What the U-Net is to predict, (B, C, H, W): noise, velocity or picture, as the scheduler says.

    Raises NestedAttentionError for another prediction type.
    """
    kind = scheduler.config["prediction_type"]
    if kind == "epsilon":
        return noise
    if kind == "v_prediction":
        return scheduler.get_velocity(latents, noise, times)
    if kind == "sample":
        return latents
    raise _unknown(kind)


def picture_of(scheduler: Any, noisy: Tensor, out: Tensor, times: Tensor) -> Tensor:
    """The latents (B, C, H, W) that the U-Net takes noisy ones for, by its prediction: what `target_of` came from.

    Raises NestedAttentionError for another prediction type.
    """
    kept = scheduler.alphas_cumprod.to(noisy)[times.to(noisy.device)].view(-1, 1, 1, 1)
    kind = scheduler.config["prediction_type"]
    if kind == "epsilon":
        return (noisy - (1 - kept).sqrt() * out) / kept.sqrt()
    if kind == "v_prediction":
        return kept.sqrt() * noisy - (1 - kept).sqrt() * out
    if kind == "sample":
        return out
    raise _unknown(kind)


def _unknown(kind: str) -> NestedAttentionError:
    return NestedAttentionError(
        f'The base model\'s scheduler predicts "{kind}"; expected epsilon, v_prediction or sample.'
    )


def _time_weights(scheduler: Any, times: Tensor, kind: str, gamma: float | None) -> Tensor:
    """Min-SNR (arXiv 2303.09556, section 3.4): min(SNR, γ) over what the target itself weighs; (B,)."""
    if gamma is None:
        return torch.ones(times.shape, device=times.device)
    snr = compute_snr(scheduler, times).clamp_min(1e-8)
    own = {"epsilon": snr, "v_prediction": snr + 1, "sample": torch.ones_like(snr)}[kind]
    return snr.clamp(max=gamma) / own


def make_optimiser(model: SubjectDenoiser, options: OptimiserConfig, processes: int = 1) -> torch.optim.Optimizer:
    """AdamW with a rate for the Q-Former and one for K̈ and V̈ (and α); only matrices decay.

    Raises NestedAttentionError: it is to be bitsandbytes', which is not installed.
    """
    groups: dict[tuple[float, float], list[Tensor]] = {}
    for name, parameter in model.named_parameters():
        qformer = name.startswith("encoder.resampler.")
        rate = options.qformer_rate if qformer else options.layers_rate
        decay = options.weight_decay if parameter.ndim == 2 else 0.0  # queries have three dimensions
        groups.setdefault((rate, decay), []).append(parameter)
    shared: dict[str, Any] = {
        "params": [{"params": part, "lr": rate, "weight_decay": decay} for (rate, decay), part in groups.items()],
        "betas": (options.beta1, options.beta2),
        "eps": options.epsilon,
    }
    if options.kind == "adamw8bit":
        return _bitsandbytes().AdamW8bit(**shared)
    fused = next(model.parameters()).device.type in ("cpu", "cuda")
    if options.shard and processes > 1:
        # Each group says its rate; the class wants one beside them.
        return ShardedAdamW(shared.pop("params"), lr=options.layers_rate, fused=fused, **shared)
    return torch.optim.AdamW(**shared, fused=fused)


def _bitsandbytes() -> Any:
    try:
        return importlib.import_module("bitsandbytes.optim")
    except ImportError as error:
        raise NestedAttentionError(
            f'optimiser.kind is "adamw8bit", which needs bitsandbytes ({error}): pip install bitsandbytes, or use '
            '"adamw".'
        ) from error
