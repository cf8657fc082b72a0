import sys; sys.path[:0]=["/tmp/wt/world16"]
import torch, os
from pathlib import Path
from safetensors.torch import load_file
from demo import models
K=24; models.LATENT_CHANNELS=K
import demo.training as T
T.PLANS["cpu"]["codec"]=T.Plan(2000,16,1.2e-3)
def start(codec, pixels):
    d={k:v.float() for k,v in load_file("/tmp/wt/world16/launch/made/codec.safetensors").items()}
    models.LATENT_CHANNELS=48; whole=models.codec(); models.LATENT_CHANNELS=K
    whole.load_state_dict(d)
    with torch.no_grad(): mean=whole.encode(pixels).latent.mean((0,2,3))
    d["encoder.conv_out.weight"]=d["encoder.conv_out.weight"][:K]; d["encoder.conv_out.bias"]=d["encoder.conv_out.bias"][:K]
    w=d["decoder.conv_in.weight"]
    d["decoder.conv_in.bias"]=d["decoder.conv_in.bias"]+w[:,K:].sum((2,3))@mean[K:]
    d["decoder.conv_in.weight"]=w[:,:K].clone()
    codec.load_state_dict(d)
    print("started; means left out", mean[K:].abs().max())
models.start_codec=start
run=T.Run(Path("/tmp/run24c"),0,1.0,frozenset({"vision","probe"}),compiled=False)
codec=run.codec()
from safetensors.torch import save_file
save_file({k:v.contiguous() for k,v in codec.state_dict().items()},"/tmp/run24c/codec24.safetensors",{"scaling_factor":str(codec.config.scaling_factor)})
print("scaling",codec.config.scaling_factor)
