"""Everything, in the order of what is needed; each part's result is kept small under /root/pack as soon as it is there."""
import os, shutil, subprocess, sys, time
from pathlib import Path
ROOT = Path(os.environ.get("W", "/root/w")); HOME = ROOT.parent
T0 = time.time(); SCALE = float(os.environ.get("SCALE", 1)); LOG = HOME / "log"; PACK = HOME / "pack"
for d in (LOG, PACK): d.mkdir(exist_ok=True)
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
def one(name, args):
    run = make_run()
    if name == "arrays": run.captions(); run.cells(); run.weighing()
    elif name == "crops": run.crops(run.pictures()); run.crops(run.unseen(), "unseen_crops")
    elif name == "references":
        from demo import lessons
        lessons.references(run.folder / "references.u8", run.pictures(), run.seed)
    elif name == "evaluate": evaluate(*args)
    elif hasattr(run, name): getattr(run, name)()
    else: run.encoder(name)
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
    arrays, crops = part("arrays", nice=2), part("crops", nice=2)
    run.latents(); say("latents")
    say("arrays", arrays.wait(), "crops", crops.wait())
    references = part("references", nice=15)
    base = run.base(); keep("base", base); say("base")
    del base; torch.cuda.is_available() and torch.cuda.empty_cache()
    say("references", references.wait())
    from demo.encoders import COMPARED
    going = {name: part(name) for name in ("nested", "controlnet", "lora", "obedience", *(COMPARED if SCALE == 1 else ("decoupled", "one_value_pairs", "nested_200_steps")))}
    exported = None
    while going:
        for name, p in list(going.items()):
            if p.poll() is not None:
                say(name, "rc", p.returncode); going.pop(name)
        if exported is None and not {"nested", "controlnet", "lora"} & set(going):
            exported = part("export")
        time.sleep(0.3)
    say("export", exported.wait())
    parts = ("table", "frontier", "budget", "pairs", "unconditional", "focus", "identity", "tokens", "views", "attention")
    n = 8 if SCALE == 1 else 2
    workers = [subprocess.Popen([sys.executable, str(ME), "evaluate", str(k), str(n), *parts], cwd=ROOT, stdout=open(LOG / f"evaluate{k}.log", "w"), stderr=subprocess.STDOUT) for k in range(n)]
    say("evaluated", [w.wait() for w in workers])
    say("report", subprocess.call([sys.executable, str(ME), "evaluate", str(n), str(n), *parts], cwd=ROOT, stdout=open(LOG / "report.log", "w"), stderr=subprocess.STDOUT))
    (HOME / "all").touch()
if __name__ == "__main__":
    one(sys.argv[1], sys.argv[2:]) if len(sys.argv) > 1 else main()
