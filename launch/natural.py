"""Latents whose unit is a pixel's: codec, latents and base rescaled channel by channel. Writes /tmp/run16p."""
import sys; sys.path[:0]=["/tmp/wt/world16"]
import torch, numpy as np, os
from pathlib import Path
from demo import models, export
from demo.training import Base, WEIGHTS, CHECKPOINT
SRC,DST="/tmp/run16w","/tmp/run16p"
os.makedirs(DST,exist_ok=True)
for f in "captions.i16 cells.i8 parts_16.u8 pictures.json pictures.pixels.u8 pictures.regions.u8 unseen.json unseen.pixels.u8 unseen.regions.u8 weights.f16 run.json".split():
    if not os.path.exists(f"{DST}/{f}"): os.link(f"{SRC}/{f}",f"{DST}/{f}")
c=models.codec(); cs=torch.load("/tmp/run16x/codec.pt",weights_only=True)
for p,e in zip(c.parameters(),cs["ema"]["shadow_params"]): p.data.copy_(e)
c.register_to_config(scaling_factor=1.2617); c.eval(); sf=1.2617
lat=np.memmap(f"{SRC}/latents.f16",np.float16,"r",shape=(24000,48,16,16))
x=torch.from_numpy(lat[:24].astype(np.float32))
sens=torch.zeros(48)
with torch.no_grad():
    ref=c.decode(x/sf).sample
    for k in range(48):
        y=x.clone(); n=torch.randn(24,16,16)*0.3; y[:,k]+=n
        sens[k]=((c.decode(y/sf).sample-ref).square().mean()*64*3/n.square().mean()).sqrt()  # per latent number
sd=torch.from_numpy(lat[:2000].astype(np.float32)).std((0,2,3))
D=sens.clone(); D[0]*=1.2*float(D[1]*sd[1]/(D[0]*sd[0])); D=D/ (D*sd).square().mean().sqrt()
print("gain",[round(float(v),2) for v in D]); print("std",[round(float(v),2) for v in D*sd])
torch.save(D,f"{DST}/gain.pt")
out=np.memmap(f"{DST}/latents.f16",np.float16,"w+",shape=lat.shape)
d=D.numpy()[None,:,None,None]
for i in range(0,24000,1000): out[i:i+1000]=(lat[i:i+1000].astype(np.float32)*d).astype(np.float16)
out.flush()
with torch.no_grad():
    c.encoder.conv_out.weight.mul_(D[:,None,None,None]); c.encoder.conv_out.bias.mul_(D)
    c.decoder.conv_in.weight.div_(D[None,:,None,None])
    px=torch.from_numpy(np.memmap(f"{SRC}/unseen.pixels.u8",np.uint8,"r",shape=(1000,128,128,3))[:16].copy()); px=models.normalise(px)
    # decoder_in_shortcut is off, encoder_out_shortcut too: channels are free
    print("PSNR",float(10*torch.log10(4/(c.decode(c.encode(px).latent).sample-px).square().mean())))
st=torch.load(f"{SRC}/base.pt",weights_only=True)
names=[n for n,_ in Base().named_parameters()]; e=st["ema"]["shadow_params"]
for suffix,f in (("conv_in.weight",lambda w:w/D[None,:,None,None]),("conv_out.weight",lambda w:w*D[:,None,None,None]),("conv_out.bias",lambda w:w*D)):
    k=f"base.unet.{suffix}"; st["module"][k]=f(st["module"][k]); i=names.index(f"unet.{suffix}"); e[i]=f(e[i])
    for key in ("exp_avg","exp_avg_sq"): st["optimizer"]["state"][i][key].zero_()
torch.save(st,f"{DST}/base.pt")
b=Base(); b.load_state_dict({k.removeprefix("base."):v for k,v in st["module"].items() if k.startswith("base.")})
export.write_checkpoint(WEIGHTS/CHECKPOINT,b.unet,b.text_encoder,c)
