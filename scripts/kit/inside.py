"""ComfyUI inside this process. What imports ComfyUI's modules (studio, random_models) comes after `import_host`."""

from pathlib import Path

import torch

from .paths import put_first


def import_host(host: Path, base: Path) -> None:
    """Makes ComfyUI's modules importable in this process; it will keep its folders in `base`. Once, before them all."""
    put_first(host)
    from comfy.cli_args import args  # found only now

    args.base_directory = str(base)
    args.cpu = not torch.cuda.is_available()
    # As in the host's main.py: before `nodes`, which puts the folder of another `utils` in front.
    import utils.extra_config  # noqa: F401

    for folder in ("custom_nodes", "models", "input", "output", "temp"):
        (base / folder).mkdir(parents=True, exist_ok=True)
