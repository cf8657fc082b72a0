"""Old world's base -> a start for the new one. Writes /tmp/run16w/start.pt"""
import sys; sys.path[:0]=["/tmp/wt/world16"]
import torch, random, time, numpy as np
import torch.nn.functional as F
from pathlib import Path
from demo import models, data
from demo.training import Base, Run
torch.manual_seed(0)
old=torch.load("/tmp/old_base.pt",weights_only=True)
run=Run(Path("/tmp/run16x"),0,1.0,frozenset({"vision","probe"}),compiled=False)
shown=run.pictures(); lat=run.latents()
# old codec: AutoencoderTiny of 16 channels, identities as main has them; load through main's code
import importlib.util, subprocess, pickle
N=600
px=run.pixels(shown.pixels,list(range(N)))
torch.save(px,"/tmp/px.pt")
subprocess.check_call([sys.executable,"-c","""
import sys; sys.path.insert(0,'/work/main')
import torch
from pathlib import Path
from demo import export
u,t,c=export.load_checkpoint(Path('/work/main/demo/weights/small_world.safetensors'))
c=c.float()
px=torch.load('/tmp/px.pt')
with torch.no_grad(): z=torch.cat([c.encode(px[i:i+50]).latents.float()*c.config.scaling_factor for i in range(0,len(px),50)])
torch.save(z,'/tmp/z_old.pt'); print(z.std())
"""])
z=torch.load("/tmp/z_old.pt"); x=torch.from_numpy(lat[:N].astype(np.float32))
rows=lambda g: g.permute(0,2,3,1).flatten(0,2)
X=torch.cat([rows(x),torch.ones(len(rows(x)),1)],1)
# ridge: noise of deviation 1 lies on the latents; a modest ridge keeps L's rows small
for ridge in (0,0.03,0.1,0.3):
    A=X.T@X/len(X); A[:-1,:-1]+=ridge*torch.eye(48)
    L=torch.linalg.solve(A,X.T@rows(z)/len(X))
    err=(X@L-rows(z)).square().mean()/rows(z).var()
    print(ridge,"unexplained",float(err),"row norms",L[:-1].norm(dim=0)[:8])
ridge=0.1
A=X.T@X/len(X); A[:-1,:-1]+=ridge*torch.eye(48)
L=torch.linalg.solve(A,X.T@rows(z)/len(X))
base=Base()
u=base.unet.state_dict(); o=old["unet"]
for k in u:
    if k in o and o[k].shape==u[k].shape: u[k]=o[k].float()
    else: print("differs",k,tuple(u[k].shape),tuple(o[k].shape) if k in o else None)
u["conv_in.weight"]=torch.einsum("osyx,cs->ocyx",o["conv_in.weight"].float(),L[:-1])
u["conv_in.bias"]=o["conv_in.bias"].float()+torch.einsum("osyx,s->o",o["conv_in.weight"].float(),L[-1])
base.unet.load_state_dict(u)
t=base.text_encoder.state_dict(); ot=old["text"]
vocab=models.tokenizer().get_vocab()
for k in t:
    if k in ot and ot[k].shape==t[k].shape: t[k]=ot[k].float()
    elif "token_embedding" in k:
        w=torch.randn(t[k].shape)*ot[k].float().std(); hits=0
        for word,i in vocab.items():
            if word in old["vocab"]: w[i]=ot[k][old["vocab"][word]].float(); hits+=1
        t[k]=w; print("words kept",hits,"of",len(vocab), [w for w in vocab if w.endswith("</w>") and len(w)>6 and w not in old["vocab"]])
    else: print("text differs",k)
base.text_encoder.load_state_dict(t)
base.eval()
# conv_out by least squares, for the picture
feats=[]; base.unet.conv_out.register_forward_pre_hook(lambda m,a: feats.append(a[0].detach()))
sched=models.scheduler(); press=(1/(1-sched.alphas_cumprod)).clamp(max=5)
caps=run.captions()
weigh=run.weighing()
G=torch.zeros(577,577,dtype=torch.float64); H=torch.zeros(577,48,dtype=torch.float64)
rng=random.Random(1)
with torch.no_grad():
    for b in range(40):
        at=[rng.randrange(20000) for _ in range(32)]
        clean=torch.from_numpy(lat[np.array(at)].astype(np.float32)); times=torch.tensor([rng.randrange(1000) for _ in at])
        noisy=sched.add_noise(clean,torch.randn_like(clean),times)
        tok=torch.from_numpy(caps[np.array(at),0].astype(np.int64))
        feats.clear(); base.unet(noisy,times,base.text_encoder(tok).last_hidden_state)
        f=F.unfold(feats[0],3,padding=1).transpose(1,2)  # B,256,576
        w=(press[times][:,None]*torch.from_numpy(weigh[np.array(at)].astype(np.float32)).flatten(1)).flatten()[:,None]
        f=torch.cat([f.flatten(0,1),torch.ones(f.shape[0]*f.shape[1],1)],1)
        G+=((f*w).T@f).double(); H+=((f*w).T@rows(clean)).double()
    G+=1e-3*G.diagonal().mean()*torch.eye(577)
    S=torch.linalg.solve(G,H).float()
    base.unet.conv_out.weight.copy_(S[:-1].T.reshape(48,64,3,3)); base.unet.conv_out.bias.copy_(S[-1])
Path("/tmp/run16w").mkdir(exist_ok=True)
torch.save(base.state_dict(),"/tmp/run16w/start.pt")
def val(base,n=16):
    rng=random.Random(7); torch.manual_seed(7); tot=0; plain=0
    with torch.no_grad():
        for b in range(n):
            at=[rng.randrange(20000,24000) for _ in range(32)]
            times=torch.tensor([rng.randrange(1000) if rng.random()<.5 else min(max(int(rng.gauss(500,150)),0),999) for _ in at])
            clean=torch.from_numpy(lat[np.array(at)].astype(np.float32))
            noisy=sched.add_noise(clean,torch.randn_like(clean),times)
            tok=torch.from_numpy(caps[np.array(at),1].astype(np.int64))
            p=base.unet(noisy,times,base.text_encoder(tok).last_hidden_state).sample
            e=(p-clean).square()*press[times][:,None,None,None]
            w=torch.from_numpy(weigh[np.array(at)].astype(np.float32))
            tot+=float((e*w).mean()/w.mean()); plain+=float(e.mean())
    return tot/n,plain/n
print("warm start",val(base))
b2=Base(); st=torch.load("/tmp/run16x/base.pt",weights_only=True)
b2.load_state_dict({k:v for k,v in st["module"].items()}); print("now, raw",st["step"],val(b2.eval()))
for p,e in zip(b2.parameters(),st["ema"]["shadow_params"]): p.data.copy_(e)
print("now, ema",val(b2))
