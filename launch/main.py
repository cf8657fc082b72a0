"""Everything, in the order of what is needed; each part's result is kept small under /root/pack as soon as it is there."""
import os, shutil, subprocess, sys, time
from pathlib import Path
ROOT = Path(os.environ.get("W", "/root/w")); HOME = ROOT.parent
T0 = time.time(); SCALE = float(os.environ.get("SCALE", 1)); LOG = HOME / "log"; PACK = HOME / "pack"; GO = HOME / "go"; MEASURE = HOME / "measure"
for d in (LOG, PACK, ROOT / "docs" / "images", ROOT / "docs" / "assets"): d.mkdir(exist_ok=True, parents=True)
def say(*a):
    with open(HOME / "say.log", "a") as f: f.write(f"== {time.time() - T0:.0f} {' '.join(map(str, a))}\n")
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]
ME = Path(__file__).resolve()
def part(name, *args, nice=0):
    log = open(LOG / f"{name}.log", "w")
    return subprocess.Popen(["nice", "-n", str(nice), sys.executable, str(ME), name, *args], cwd=ROOT, stdout=log, stderr=subprocess.STDOUT)
def make_run():
    import torch
    torch.backends.cudnn.benchmark = True
    from demo.training import Run
    # Made before, on CPUs: launch/begin.py has written the checkpoint that codec and base begin with.
    run = Run(ROOT / "demo" / "run", 0, SCALE, frozenset({"vision", "probe", "codec"}), warm=True)
    run.weights = ROOT / "demo" / "weights"
    for made in (ROOT / "launch" / "made").glob("qformer*.safetensors"):
        if not (run.folder / made.name).is_file(): shutil.copyfile(made, run.folder / made.name)
    return run
def keep(name, module):
    from safetensors.torch import save_file
    save_file({k: v.detach().cpu().half().contiguous().clone() for k, v in module.state_dict().items()}, PACK / f"{name}.safetensors")
EARLY = ("captions", "arrays", "crops", "decoder", "references", "export")
def one(name, args):
    if name.startswith("evaluate"):
        ready(MEASURE)
        return evaluate(*args)
    if name not in EARLY: ready(GO)
    run = make_run()
    if name == "captions": run.captions()
    elif name == "arrays": run.cells(); run.weighing(); run.parts(16)
    elif name == "decoder": decoder(run)
    elif name == "crops": run.crops(run.pictures()); run.crops(run.unseen(), "unseen_crops")
    elif name == "references":
        from demo import lessons
        lessons.references(run.folder / "references.u8", run.pictures(), run.seed)
    elif hasattr(run, name): getattr(run, name)()
    else: run.encoder(name)
def decoder(run):
    """The codec's decoder, trained anew for the latents that its encoder makes already: "codec" of demo/training.py with the encoder frozen."""
    import torch, torch.nn.functional as F
    from safetensors.torch import save_file
    from demo import drawing, models
    codec, shown, unseen = run.codec(), run.pictures(), run.unseen()
    codec.encoder.requires_grad_(False)
    pictures, crop = run.placed(shown.pixels), 64
    side = torch.arange(crop, device=run.device)
    def draw(rng):
        chosen = run.chosen("codec", rng, len(shown))
        return [torch.tensor(of) for of in (chosen, *([rng.randrange(0, drawing.SIZE - crop + 1, 8) for _ in chosen] for _ in range(2)))]
    def loss(chosen, top, left):
        pixels = models.normalise(pictures[chosen[:, None, None], top[:, None, None] + side[:, None], left[:, None, None] + side])
        pixels = pixels.contiguous(memory_format=torch.channels_last)
        with torch.no_grad(): latents = codec.encoder(pixels).float()
        out = codec.decoder(latents + 0.03 * torch.randn_like(latents)).float()
        error = out - pixels
        edges = F.l1_loss(out.diff(dim=2), pixels.diff(dim=2)) + F.l1_loss(out.diff(dim=3), pixels.diff(dim=3))
        return error.abs().mean() + 2 * error.square().mean() + 0.5 * edges, {"mse": error.detach().square().mean()}
    def note(step):
        errors = []
        for start in range(0, len(unseen), 50):
            pixels = run.pixels(unseen.pixels, list(range(start, min(start + 50, len(unseen)))))
            errors.append((codec.decoder(codec.encoder(pixels)) - pixels).square().flatten(1).mean(1))
        errors = torch.cat(errors).float()
        return {"unseen PSNR": float(10 * torch.log10(4 / errors.mean())), "mean of each": float((10 * torch.log10(4 / errors)).mean())}
    run.fit("codec", codec.decoder.requires_grad_(True), loss, draw, 0, name="decoder", note=note, note_every=500)
    save_file({f"decoder.{k}": v.detach().cpu().half().contiguous().clone() for k, v in codec.decoder.state_dict().items()}, PACK / "decoder.safetensors")
def ready(*files):
    """Imports what a part needs and waits for these files: starting takes as long as a hundred steps."""
    import torch, demo.training, demo.lessons, kit.evaluation.run
    while not all(f.exists() for f in files): time.sleep(0.2)
def evaluate(k, n, *parts):
    """Worker k of n makes a share of the conditions; k = n: the report, from what they made."""
    from kit.evaluation import cases, run as R
    k, n = int(k), int(n)
    if k < n:
        from demo import models
        counter = [0]
        def told(self, condition, of, noises):
            counter[0] += 1
            if counter[0] % n == k: return cases_told(self, condition, of, noises)
            return [{name: [0] * len(noises) for name in models.SCORED} for _ in of]
        cases_told = cases.Bench._told
        cases.Bench._told = told
        R.write_report = lambda *a: None
        R.write_sheet = lambda *a: None
    R.evaluate(None, ROOT / "demo" / "run", 48 if SCALE == 1 else 2, list(parts), SCALE != 1)
def main():
    import torch
    sys.path[:0] = [str(ROOT / "launch")]
    import begin; begin.begin()
    run = make_run(); say("imported")
    run.pictures(); run.unseen(); say("drawn")
    arrays, captions, crops = part("arrays", nice=2), part("captions", nice=2), part("crops", nice=5)
    decoder = part("decoder")
    run.latents(); say("latents")
    say("arrays", arrays.wait(), "captions", captions.wait())
    references = part("references", nice=15)
    from demo.encoders import COMPARED
    names = ("nested", "controlnet", "lora", "obedience", *(COMPARED if SCALE == 1 else ("decoupled", "one_value_pairs", "nested_200_steps")))
    going = {name: part(name, nice=5) for name in names}
    parts = ("table", "frontier", "budget", "pairs", "unconditional", "focus", "identity", "tokens", "views", "attention")
    n = 8 if SCALE == 1 else 2
    workers = [part(f"evaluate{k}", str(k), str(n), *parts, nice=10) for k in range(n)]
    base = run.base(); keep("base", base); say("base")
    del base; torch.cuda.is_available() and torch.cuda.empty_cache()
    say("decoder", decoder.wait(), "crops", crops.wait(), "references", references.wait())
    begin.begin(PACK / "decoder.safetensors")
    GO.touch()
    exported = None
    while going:
        for name, p in list(going.items()):
            if p.poll() is not None:
                say(name, "rc", p.returncode); going.pop(name)
        if exported is None and not {"nested", "controlnet", "lora"} & set(going):
            exported = part("export")
        time.sleep(0.3)
    say("export", exported.wait())
    MEASURE.touch()
    say("evaluated", [w.wait() for w in workers])
    say("report", subprocess.call([sys.executable, str(ME), f"evaluate{n}", str(n), str(n), *parts], cwd=ROOT, stdout=open(LOG / "report.log", "w"), stderr=subprocess.STDOUT))
    (HOME / "all").touch()
if __name__ == "__main__":
    one(sys.argv[1], sys.argv[2:]) if len(sys.argv) > 1 else main()
