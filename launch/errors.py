"""Where a base model errs: `python launch/errors.py RUN` prints the error of the picture by timestep, beside the best linear filter's."""
import sys
from pathlib import Path
ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT)]
import numpy as np
import torch
from demo import data, models
from demo.training import Base
HELD = slice(23000, 23024)
def load(run):
    """A run's base with its averaged weights."""
    base, state = Base(), torch.load(Path(run) / "base.pt", weights_only=True, map_location="cpu")
    for weight, average in zip(base.parameters(), state["ema"]["shadow_params"]): weight.data.copy_(average)
    print(run, "step", state["step"])
    return base.eval()
def array(run, name, dtype, *shape):
    return np.memmap(Path(run) / name, dtype, "r", shape=(data.PICTURES, *shape))
def latents(run, at):
    of = array(run, "latents.f16", np.float16, models.LATENT_CHANNELS, models.LATENT_SIZE, models.LATENT_SIZE)
    return torch.from_numpy(of[at].astype(np.float32))
@torch.no_grad()
def report(run):
    base, scheduler, x = load(run), models.scheduler(), latents(run, HELD)
    tokens = torch.from_numpy(array(run, "captions.i16", np.int16, 8, models.TEXT_LENGTH)[HELD, 0].astype(np.int64))
    weight = torch.from_numpy(array(run, "weights.f16", np.float16, 1, models.LATENT_SIZE, models.LATENT_SIZE)[HELD].astype(np.float32))
    noise, spread = torch.randn(x.shape, generator=torch.Generator().manual_seed(0)), x.var((0, 2, 3))
    text = base.text_encoder(tokens).last_hidden_state
    for time in (1, 20, 100, 200, 300, 400, 500, 600, 700, 800, 999):
        times = torch.full((len(x),), time)
        error = (base.unet(scheduler.add_noise(x, noise, times), times, text).sample - x) ** 2
        ratio = float((1 - scheduler.alphas_cumprod[time]) / scheduler.alphas_cumprod[time])
        linear = (ratio * spread / (spread + ratio)).mean()
        print(f"{time} (sigma {ratio ** 0.5:.3f}): {error.mean():.4f}, figure {(error * weight).mean() / weight.mean():.4f}, linear {linear:.4f}")
if __name__ == "__main__":
    report(sys.argv[1])
