"""What was trained of base and codec so far, as demo/weights/small_world.safetensors: `python launch/begin.py`.

`python launch/begin.py keep RUN STAGE` packs a stage of a run (half or base; its averaged weights) into launch/made, in 8 bits.
"""
import sys
from pathlib import Path
ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT)]
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from demo import export, models
from demo.shipped import CHECKPOINT, WEIGHTS
from demo.training import Base
MADE = ROOT / "launch" / "made"
def keep(run, stage):
    state = torch.load(Path(run) / f"{stage}.pt", map_location="cpu", weights_only=True)
    base, out = Base(), {}
    # The base comes first; what follows are heads that only its training has.
    for (name, _), weight in zip(base.named_parameters(), state["ema"]["shadow_params"]):
        if weight.ndim < 2: out[name] = weight.half(); continue
        scale = weight.flatten(1).abs().amax(1).clamp(min=1e-8) / 127
        out[name] = (weight / scale.view(-1, *[1] * (weight.ndim - 1))).round().to(torch.int8)
        out[f"{name} scale"] = scale.half()
    out = {name: part.contiguous() for name, part in out.items()}
    save_file(out, MADE / "base.safetensors", {"stage": stage, "step": str(state["step"])})
    print(stage, state["step"])
def begin(decoder=None):
    torch.manual_seed(20)
    base, packed = Base(), load_file(MADE / "base.safetensors") if (MADE / "base.safetensors").is_file() else {}
    with torch.no_grad():
        for name, weight in base.named_parameters() if packed else ():
            found = packed[name].float()
            if packed[name].dtype == torch.int8: found = found * packed[f"{name} scale"].float().view(-1, *[1] * (found.ndim - 1))
            weight.copy_(found)
    codec = models.codec()
    weights = load_file(MADE / "codec.safetensors")
    decoder = Path(decoder) if decoder else None
    # The decoder of the codec of 27.2 dB was smaller than the one of models.codec(): then it is made anew.
    fits = {n: w for n, w in weights.items() if codec.state_dict().get(n, w[None]).shape == w.shape}
    if len(fits) < len(weights): fits = {n: w for n, w in weights.items() if n.startswith("encoder.")}
    if decoder: fits |= load_file(decoder)
    codec.load_state_dict(fits, strict=False)
    with safe_open(MADE / "codec.safetensors", "pt") as file: codec.register_to_config(scaling_factor=float(file.metadata()["scaling_factor"]))
    export.write_checkpoint(WEIGHTS / CHECKPOINT, base.unet, base.text_encoder, codec)
if __name__ == "__main__":
    keep(*sys.argv[2:]) if sys.argv[1:2] == ["keep"] else begin()
