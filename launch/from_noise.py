exec(open("/tmp/ek.py").read().split('if __name__')[0])
from safetensors.torch import load_file
from PIL import Image
run=sys.argv[1]
base,st=load(f"{run}/base.pt","ema" in sys.argv); print(st["step"])
c=models.codec(); c.load_state_dict({k:v.float() for k,v in load_file("/tmp/run24c/codec24.safetensors").items()}); c.eval(); SF=1.2683
lat=np.memmap(f"{run}/latents.f16",np.float16,"r",shape=(24000,K,16,16)); caps=np.memmap(f"{run}/captions.i16",np.int16,"r",shape=(24000,8,77))
import json
E=json.load(open(f"{run}/pictures.json"))["entries"]
want=[]
for st_ in ("flat","comic","watercolour","crayon","pencil","neon"):
    want.append(next(i for i in range(23000,24000) if E[i]["style"]==st_ and len(E[i]["figures"])==1))
at=np.array(want+[next(i for i in range(23000,24000) if len(E[i]["figures"])==2)])
x=torch.from_numpy(lat[at].astype(np.float32))
from demo import data
from demo.data import Entry
from demo.world import Figure,Look
texts=[data.plain_prompt(Entry([Figure(**f) for f in E[i]["figures"]],[Look(**l) for l in E[i]["looks"]],E[i]["scene"],E[i]["style"])) for i in at]; print("\n".join(texts))
s=models.scheduler(); torch.manual_seed(0); n=torch.randn_like(x)
sig=((1-s.alphas_cumprod)/s.alphas_cumprod).sqrt()
with torch.no_grad():
    text=base.read([*texts,*([""]*len(texts))])
    rows=[c.decode(x/SF).sample]
    def run_from(t0,cfg,steps):
        ts=torch.linspace(t0,0,steps).long(); sg=torch.cat([sig[ts],torch.zeros(1)])
        y=x+n*sg[0] if t0<999 else n*(1+sg[0]**2).sqrt()
        for i in range(steps):
            o=base.unet((y*(1+sg[i]**2)**-.5).repeat(2,1,1,1),ts[i],text).sample; p,q=o.chunk(2)
            if KIND=="v":
                f=lambda v: y/(1+sg[i]**2)-v*sg[i]/(1+sg[i]**2)**.5
                p,q=f(p),f(q)
            d=q+cfg*(p-q); y=y+(y-d)/sg[i]*(sg[i+1]-sg[i])
        return c.decode(y/SF).sample
    for t0,cfg,steps in ((1,1,1),(100,1,4),(300,1,7),(500,1,10),(700,1,14),(999,1,20),(999,2,20),(999,4,20)):
        rows.append(run_from(t0,cfg,steps)); print(t0,cfg,flush=True)
out=torch.cat([torch.cat(list(((r.clamp(-1,1)+1)*127.5).byte()),2) for r in rows],1).permute(1,2,0).numpy()
Image.fromarray(out).resize((out.shape[1]*3//2,out.shape[0]*3//2)).save(sys.argv[2])
