"""obey.py RUN OUT: obedience by axis for samplers; a sheet of each."""
exec(open("/tmp/ek.py").read().split('if __name__')[0])
from safetensors.torch import load_file
from PIL import Image
from demo import data
from demo.judging import judge
from demo.sampling import to_bytes
run=sys.argv[1]; base,st=load(f"{run}/base.pt",True); print(st["step"])
r=T.Run(Path(run),0,1.0,frozenset({"vision","probe","codec"}),warm=True); probe=r.probe()
c=models.codec(); c.load_state_dict({k:v.float() for k,v in load_file(f"{run}/codec24.safetensors").items()}); c.eval(); SF=1.2683
s=models.scheduler(); sig=((1-s.alphas_cumprod)/s.alphas_cumprod).sqrt()
N=int(os.environ.get("N","48"))
rng=random.Random("obedience seen"); entries=[data.random_entry(rng,1,False) for _ in range(N)]
texts=[data.plain_prompt(e) for e in entries]
drawn=torch.stack([torch.from_numpy(np.asarray(data.draw(e,random.Random(i)).image).copy()).permute(2,0,1) for i,e in enumerate(entries)])
def told(px): 
    t=judge(probe,px,entries); return ", ".join(f"{k} {v:.2f}" for k,v in t.items() if not k.startswith("identity"))
@torch.no_grad()
def sample(cfg,steps,eta):
    out=[]
    for at in range(0,N,24):
        te=texts[at:at+24]; text=base.read([*te,*([""]*len(te))]); g=torch.Generator().manual_seed(at)
        ts=torch.linspace(999,0,steps).long(); sg=torch.cat([sig[ts],torch.zeros(1)])
        y=torch.randn((len(te),K,16,16),generator=g)*(1+sg[0]**2).sqrt()
        for i in range(steps):
            p,q=base.unet((y*(1+sg[i]**2)**-.5).repeat(2,1,1,1),ts[i],text).sample.chunk(2); d=q+cfg*(p-q); a,b=sg[i],sg[i+1]
            up=min(float(b),eta*float((b**2*(a**2-b**2)/a**2)**.5)) if b>0 else 0.; down=(float(b)**2-up**2)**.5
            y=y+(y-d)/a*(down-a)+up*torch.randn(y.shape,generator=g)
        out.append(to_bytes(c.decode(y/SF).sample))
    return torch.cat(out)
print("as drawn:",told(drawn))
with torch.no_grad(): z=c.decode(c.encode(drawn.float()/127.5-1).latent).sample
print("through the codec:",told(to_bytes(z)))
rows=[]
for cfg,steps,eta in ((4,20,0),(2.5,20,1),(4,20,1)):
    px=sample(cfg,steps,eta); print(cfg,steps,eta,told(px),flush=True); rows.append(px[:16])
out=torch.cat([torch.cat(list(x[i:i+8]),2) for x in rows for i in (0,8)],1).permute(1,2,0).numpy()
Image.fromarray(out).resize((out.shape[1]*3//2,out.shape[0]*3//2)).save(sys.argv[2])
