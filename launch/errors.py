import sys; sys.path[:0]=["/tmp/wt/world16"]
import torch, numpy as np, random, os, time
import torch.nn.functional as F
from pathlib import Path
from demo import models
K=int(os.environ.get("K","24")); KIND=os.environ.get("KIND","x"); TOTAL=int(os.environ.get("TOTAL","6000"))
models.LATENT_CHANNELS=K
import demo.training as T
from demo.training import Base, Run
from demo.listening import Listening
from diffusers.models.attention_processor import AttnProcessor
BATCH=int(os.environ.get("BATCH","32")); RATE=float(os.environ.get("RATE","1e-3"))
T.PLANS["cpu"]["base"]=T.Plan(TOTAL,BATCH,RATE)
def build(): 
    torch.manual_seed(20); return Base()
class ERun(Run):
    def codec(self): return None
    def sample(self,*a,**k): return torch.zeros(4,3,8,8,dtype=torch.uint8)
    def base(self):
        base=build()
        base.text_encoder.set_attn_implementation("eager")
        base.unet.set_attn_processor(Listening())
        self._learn("base",base)
        return base
    def denoising_loss(self, drawn, latents, base, predict):
        if KIND=="x": return super().denoising_loss(drawn, latents, base, predict)
        chosen, said, times = drawn
        captions, weighing = self._lessons
        tokens, clean = captions[chosen, said].long(), latents[chosen].float()
        noise = torch.randn_like(clean)
        noisy = self._scheduler.add_noise(clean, noise, times).contiguous(memory_format=torch.channels_last)
        text = base.text_encoder(tokens).last_hidden_state
        predicted = predict(noisy, times, text, chosen, tokens).float()
        a=self._scheduler.alphas_cumprod[times][:,None,None,None]
        error=(predicted-(a.sqrt()*noise-(1-a).sqrt()*clean)).square()
        weight=F.adaptive_avg_pool2d(weighing[chosen].float(), clean.shape[-1])
        return (error*weight).mean()/weight.mean(), {"plain": error.detach().mean()}
def load(path, ema=False):
    base=Base(); st=torch.load(path,weights_only=True,map_location="cpu")
    base.load_state_dict({k.removeprefix("base."):v for k,v in st["module"].items() if k.startswith("base.")})
    if ema:
        for p,e in zip(base.parameters(),st["ema"]["shadow_params"]): p.data.copy_(e)
    base.unet.set_attn_processor(AttnProcessor()); return base.eval(),st
def report(run, kind, ema=False, first=None):
    base,st=load(f"{run}/base.pt",ema); print(run,st["step"],"ema" if ema else "raw")
    lat=np.memmap(f"{run}/latents.f16",np.float16,"r",shape=(24000,K,16,16)); caps=np.memmap(f"{run}/captions.i16",np.int16,"r",shape=(24000,8,77)); w=np.memmap(f"{run}/weights.f16",np.float16,"r",shape=(24000,1,16,16))
    at=np.arange(23000,23024); x=torch.from_numpy(lat[at].astype(np.float32)); tok=torch.from_numpy(caps[at,0].astype(np.int64)); W=torch.from_numpy(w[at].astype(np.float32))
    s=models.scheduler(); torch.manual_seed(0); var=x.var((0,2,3)); n=torch.randn(24,48,16,16)[:,:K]
    with torch.no_grad():
        text=base.text_encoder(tok).last_hidden_state
        for t in (1,20,100,200,300,400,500,600,700,800,999):
            tt=torch.full((24,),t); noisy=s.add_noise(x,n,tt); a=float(s.alphas_cumprod[t]); r=(1-a)/a
            o=base.unet(noisy,tt,text).sample
            xh=o if kind=="x" else a**.5*noisy-(1-a)**.5*o
            e=(xh-x)**2; wien=float((r*var/(var+r)).mean())
            print(t,"sigma %.3f"%r**.5,"mse %.4f figure %.4f wiener %.4f"%(float(e.mean()),float((e*W).mean()/W.mean()),wien), *(["first %d: %.4f"%(first,float(e[:,:first].mean()))] if first else []),flush=True)
if __name__=="__main__":
    if sys.argv[1]=="train": ERun(Path(sys.argv[2]),0,1.0,frozenset({"vision","probe","codec"}),warm=True,compiled=True).base()
    else: report(sys.argv[2],KIND,"ema" in sys.argv, 24)
