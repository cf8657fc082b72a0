"""Where shapes get lost: `python launch/from_noise.py RUN OUT` denoises drawn pictures from several timesteps, a row each."""
import sys
from errors import latents, load  # beside this file
import torch
from demo import data, world
from demo.sampling import to_bytes
from demo.training import Run, _save_sheet
from pathlib import Path
STARTS = ((1, 1, 1), (100, 1, 4), (300, 1, 7), (500, 1, 10), (700, 1, 14), (999, 1, 20), (999, 2, 20), (999, 4, 20))  # timestep, cfg, steps
@torch.no_grad()
def main(folder, out):
    base = load(folder)
    run = Run(Path(folder), 0, 1.0, frozenset({"vision", "probe", "codec"}), warm=True)
    codec, entries, signal = run.codec(), run.pictures().entries, run._scheduler.alphas_cumprod
    at = [next(i for i in range(23000, 24000) if entries[i].style == style and len(entries[i].figures) == 1) for style in world.STYLES]
    texts = [data.plain_prompt(entries[i]) for i in at]
    print("\n".join(texts))
    x, sigma, text = latents(folder, at), ((1 - signal) / signal).sqrt(), base.read([*texts, *([""] * len(texts))])
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
    rows = [x]
    for start, cfg, steps in STARTS:
        times = torch.linspace(start, 0, steps).long()
        sigmas = torch.cat([sigma[times], torch.zeros(1)])
        y = x + noise * sigmas[0] if start < 999 else noise * (1 + sigmas[0] ** 2).sqrt()
        for time, now, then in zip(times, sigmas, sigmas[1:]):
            positive, negative = base.unet((y * (1 + now**2) ** -0.5).repeat(2, 1, 1, 1), time, text).sample.chunk(2)
            y = y + (y - negative - cfg * (positive - negative)) / now * (then - now)
        rows.append(y)
    _save_sheet(to_bytes(codec.decode(torch.cat(rows) / codec.config.scaling_factor).sample), Path(out), len(at))
if __name__ == "__main__":
    main(*sys.argv[1:3])
