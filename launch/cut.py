"""base.pt of 48 channels -> of K channels; latents too."""
import sys, torch, numpy as np, os, json, shutil
K=int(sys.argv[1]); src,dst="/tmp/run16w",sys.argv[2]
os.makedirs(dst,exist_ok=True)
st=torch.load(f"{src}/base.pt",weights_only=True,map_location="cpu")
names=[n for n in st["module"]]
params=names  # all are parameters? 
def cut(n,t):
    if n=="base.unet.conv_in.weight": return t[:,:K].clone()
    if n in("base.unet.conv_out.weight","base.unet.conv_out.bias"): return t[:K].clone()
    return t
idx=st["optimizer"]["param_groups"][0]["params"]; print(len(idx),len(names))
for n in names: st["module"][n]=cut(n,st["module"][n])
for i,n in enumerate(names):
    st["ema"]["shadow_params"][i]=cut(n,st["ema"]["shadow_params"][i])
    s=st["optimizer"]["state"][i]
    for k in("exp_avg","exp_avg_sq"): s[k]=cut(n,s[k])
torch.save(st,f"{dst}/base.pt")
lat=np.memmap(f"{src}/latents.f16",np.float16,"r",shape=(24000,48,16,16))
out=np.memmap(f"{dst}/latents.f16",np.float16,"w+",shape=(24000,K,16,16)); out[:]=lat[:,:K]; out.flush()
for f in os.listdir(src):
    if f.startswith(("captions","cells","pictures","parts","unseen","weights.f16")) and not os.path.exists(f"{dst}/{f}"): os.link(f"{src}/{f}",f"{dst}/{f}")
