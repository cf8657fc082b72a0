import sys; sys.path.insert(0,"/work/main")
import torch
from demo import export, models
from demo.shipped import *
from pathlib import Path
u,t,c=export.load_checkpoint(Path("/work/main/demo/weights/small_world.safetensors"))
tok=models.tokenizer()
torch.save({"unet":u.state_dict(),"text":t.state_dict(),"codec":c.state_dict(),"vocab":tok.get_vocab(),"scale":c.config.scaling_factor},"/tmp/old_base.pt")
print(sum(p.numel() for p in u.parameters()), c.config.scaling_factor, models.LATENT_SIZE)
