"""From a clone to a picture, with one command: a real ComfyUI, this pack in it, and the example graph run once.

    python scripts/quickstart.py              makes the picture and says where it is
    python scripts/quickstart.py --serve      and leaves ComfyUI up, with the graph ready to open

Sets up what it needs first (see _setup.py): a virtual environment `.venv` unless one is active, and a ComfyUI under
`.comfyui` unless COMFYUI_PATH names one, whose Python environment must then be the active one.

The models are made on the spot (see random_models.py) and have random weights: the picture shows that every part runs
and is wired up, and is noise. Put real models in with `random_models.provide_models`.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import shutil
import urllib.error
import uuid
from pathlib import Path
from typing import Any

import _setup
import random_models
from _setup import HOSTS, NEWEST, REPO, STATE, Server, SetupError, say

WORKFLOW = REPO / "workflows" / "first_portrait.json"
USUAL_PORT = 8188  # ComfyUI's own default
SIZE, STEPS = 256, 4
Graph = dict[str, dict[str, Any]]


def main() -> int:
    """Returns the exit code: 0 where the picture was made."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--serve", action="store_true", help="leave the server up afterwards; Ctrl-C stops it")
    parser.add_argument("--port", type=int, default=0, help=f"default: {USUAL_PORT} with --serve, or any")
    parser.add_argument("--host", choices=list(HOSTS), help=f"which ComfyUI to fetch (default: {NEWEST})")
    parser.add_argument("--image", type=Path, help="your photo of the subject (default: one that scikit-image ships)")
    parser.add_argument("--prompt", default="a photo of <person> in a garden", help='must contain "<person>"')
    arguments = parser.parse_args()
    if arguments.image and not arguments.image.is_file():
        raise SetupError(f"There is no picture at {arguments.image.resolve()}.")

    own = _setup.own_comfyui()
    if own and arguments.host:
        raise SetupError("COMFYUI_PATH already says which ComfyUI to use: unset it, or leave out --host.")
    _setup.enter_environment()
    photo = [line for line in _setup.test_requirements() if line.startswith("scikit-image")]
    if own:
        _setup.check_own_environment(own)
        host = own
    else:
        newest = _setup.fetch_host(NEWEST)
        host = _setup.fetch_host(arguments.host or NEWEST)
        _setup.install([*_setup.host_requirements([newest, host]), *photo], "ComfyUI's packages")

    pack = _setup.link_pack(host)
    usual = USUAL_PORT if arguments.serve and _setup.is_free(USUAL_PORT) else 0
    server = Server(host, models=STATE / "models", port=arguments.port or usual, only=[pack])
    names = random_models.provide_models(host, STATE / "models", server.input, photo=not arguments.image)
    if arguments.image:
        names["image"] = arguments.image.name
        if arguments.image.resolve().parent != server.input:
            shutil.copyfile(arguments.image, server.input / arguments.image.name)

    example = host / "input" / "example.png"  # ComfyUI's own, which the template names
    if example.is_file() and not (server.input / example.name).exists():
        shutil.copyfile(example, server.input / example.name)
    say(f"starting ComfyUI {_setup.version_of(host)} at {server.url}, log in {server.log}")
    with server:
        graph = portrait_graph(names, arguments.prompt)
        check_nodes(server, graph)
        say(f"running the graph: {len(graph)} nodes")
        outputs = asyncio.run(run_graph(server, graph))
        for picture in saved_pictures(server, outputs):
            say(f"the picture is at {picture}")
        say("It is noise: these models have random weights. What it shows is that every part runs.")
        if arguments.serve:
            _serve(server, pack, names)
        else:
            say("With --serve, ComfyUI stays up with this graph ready to open.")
    return 0


def portrait_graph(names: dict[str, str], prompt: str) -> Graph:
    """The graph of workflows/first_portrait.json as ComfyUI's API takes it, small and with few steps.

    names  file names by input, as `provide_models` returns them
    """

    def node(kind: str, **inputs: Any) -> dict[str, Any]:
        return {"class_type": kind, "inputs": inputs}

    return {
        "checkpoint": node("CheckpointLoaderSimple", ckpt_name=names["ckpt_name"]),
        "tower": node("CLIPVisionLoader", clip_name=names["clip_name"]),
        "encoder": node(
            "NestedEncoderLoader",
            encoder_name=names["encoder_name"],
            image_features="auto",
            value_norm="auto",
            alpha=0.0,
            pooled="auto",
        ),
        "photo": node("LoadImage", image=names["image"]),
        "subject": node(
            "NestedEncodeSubject",
            encoder=["encoder", 0],
            clip_vision=["tower", 0],
            image=["photo", 0],
            placeholder="<person>",
            class_word="person",
            fit="crop",
        ),
        "seen": node("PreviewImage", images=["subject", 1]),
        "apply": node(
            "NestedApplySubject",
            model=["checkpoint", 0],
            clip=["checkpoint", 1],
            subject=["subject", 0],
            strength=1.0,
            start_percent=0.0,
            end_percent=1.0,
        ),
        "positive": node("CLIPTextEncode", clip=["apply", 1], text=prompt),
        "negative": node("CLIPTextEncode", clip=["apply", 1], text="bad anatomy, lowres, worst quality, low quality"),
        "latent": node("EmptyLatentImage", width=SIZE, height=SIZE, batch_size=1),
        "sampler": node(
            "KSampler",
            model=["apply", 0],
            positive=["positive", 0],
            negative=["negative", 0],
            latent_image=["latent", 0],
            seed=1,
            steps=STEPS,
            cfg=5.0,
            sampler_name="euler",
            scheduler="normal",
            denoise=1.0,
        ),
        "decode": node("VAEDecode", samples=["sampler", 0], vae=["checkpoint", 2]),
        "save": node("SaveImage", images=["decode", 0], filename_prefix="nested_attention/first_portrait"),
    }


def check_nodes(server: Server, graph: Graph) -> None:
    """Raises SetupError, with what the server's log says about it, if the server lacks a node of the graph."""
    known = server.request("/object_info", timeout=120)
    if unknown := sorted({node["class_type"] for node in graph.values()} - known.keys()):
        raise SetupError(
            f"ComfyUI runs, but has no node {', '.join(unknown)}: the pack was not loaded, or only in part.\n"
            f"{server.log_tail(60)}"
        )


async def run_graph(server: Server, graph: Graph) -> dict[str, Any]:
    """Queues a graph and follows it with a progress bar to its end. Returns its outputs by node.

    Raises SetupError with the node and its message if the graph is refused or fails, or if the server ends.
    """
    import aiohttp
    from tqdm import tqdm

    client = uuid.uuid4().hex
    done: set[str] = set()
    layout = "{desc:<38} {bar:30} {n_fmt}/{total_fmt} {elapsed}"
    with tqdm(total=len(graph), unit="node", bar_format=layout, disable=None) as bar:

        def finished(nodes: Any) -> None:
            done.update(nodes)
            bar.n = len(done & graph.keys())
            bar.refresh()

        async with (
            aiohttp.ClientSession() as session,
            session.ws_connect(f"{server.url}/ws?clientId={client}", max_msg_size=0) as socket,
        ):
            prompt = _queue(server, graph, client)
            running = None
            async for message in socket:
                if message.type is not aiohttp.WSMsgType.TEXT:
                    continue  # preview pictures
                event = json.loads(message.data)
                kind, data = event["type"], event.get("data", {})
                if data.get("prompt_id") != prompt:
                    continue
                if kind == "execution_cached":
                    finished(data["nodes"])
                elif kind == "executing" and data["node"]:
                    finished([running] if running else [])
                    running = data["node"]
                    bar.set_description_str(_title(graph, running))
                    if bar.disable:  # not a terminal: a line per node in place of the bar
                        say(_title(graph, running))
                elif kind == "progress":
                    bar.set_description_str(f"{_title(graph, running)} {data['value']}/{data['max']}")
                elif kind == "executing":  # no node: all is over, and in the history
                    bar.set_description_str("done")
                    finished(graph)
                    break
                elif kind == "execution_error":
                    bar.close()
                    raise SetupError(_execution_error(data, server))
                elif kind == "execution_interrupted":
                    bar.close()
                    raise SetupError(f"The run was interrupted at {_title(graph, data.get('node_id'))}.")
            else:
                bar.close()
                await asyncio.sleep(2)  # time for a dying server to be dead
                where = f"at {_title(graph, running)}"
                server.check_alive(where)
                raise SetupError(f"The connection to the server was lost {where}. {server.log_tail()}")
    return server.request(f"/history/{prompt}")[prompt]["outputs"]


def _queue(server: Server, graph: Graph, client: str) -> str:
    try:
        return str(server.request("/prompt", {"prompt": graph, "client_id": client})["prompt_id"])
    except urllib.error.HTTPError as refusal:
        answer = json.loads(refusal.read() or "{}")
    lines = [f"ComfyUI refused the graph: {answer.get('error', {}).get('message', answer)}"]
    for node, wrong in (answer.get("node_errors") or {}).items():
        for error in wrong["errors"]:
            lines.append(f"  {_title(graph, node)}: {error['message']}: {error['details']}")
    raise SetupError("\n".join(lines))


def _title(graph: Graph, node: str | None) -> str:
    return f"{graph[node]['class_type']} ({node})" if node in graph else "start"


def _execution_error(data: dict[str, Any], server: Server) -> str:
    kind = str(data.get("exception_type")).rpartition(".")[2]
    return (
        f"{data.get('node_type')} ({data.get('node_id')}) failed with {kind}:\n"
        f"    {str(data.get('exception_message')).strip()}\n"
        f"Where in the code, the server's log says: {server.log}"
    )


def saved_pictures(server: Server, outputs: dict[str, Any]) -> list[Path]:
    """The files that SaveImage nodes wrote. Raises SetupError if there are none, or one is of a single colour."""
    from PIL import Image

    images = [image for output in outputs.values() for image in output.get("images", [])]
    files = [server.output / image["subfolder"] / image["filename"] for image in images if image["type"] == "output"]
    if not files or not all(file.is_file() for file in files):
        raise SetupError(f"The graph ran, but saved no picture in {server.output}. {server.log_tail()}")
    for file in files:
        with Image.open(file) as picture:
            if all(low == high for low, high in picture.convert("RGB").getextrema()):
                raise SetupError(f"{file} is of one single colour: NaN in the models is the usual cause.")
    return files


def _serve(server: Server, pack: str, names: dict[str, str]) -> None:
    """Says how to open the graph in the browser and waits until the server ends or Ctrl-C."""
    template = WORKFLOW.stem
    saved = server.user / "default" / "workflows" / f"{template}_random_models.json"
    saved.parent.mkdir(parents=True, exist_ok=True)
    saved.write_text(json.dumps(with_models(json.loads(WORKFLOW.read_text("utf-8")), names), indent=1), "utf-8")
    print(
        f"\nComfyUI is up at {server.url}\n"
        f"  with the models made here: Workflows in the sidebar (key w), {saved.stem}, then Run\n"
        f"  as others get it, for your own models: {server.url}/?template={template}&source={pack}\n"
        f"    (the same by hand: Templates in the sidebar, Extensions, {pack}, {template})\n"
        "Ctrl-C stops it.",
        flush=True,
    )
    try:
        if server.process:
            server.process.wait()
    except KeyboardInterrupt:
        say("stopping")
        return
    server.check_alive("by itself")


def with_models(workflow: dict[str, Any], names: dict[str, str]) -> dict[str, Any]:
    """A UI-format workflow with its loaders' file names (their first widget) replaced, and as small as the graph here.

    Small, since a picture of noise is not worth the minutes that a big one takes on a CPU.
    """
    loaders = {
        "CheckpointLoaderSimple": "ckpt_name",
        "CLIPVisionLoader": "clip_name",
        "NestedEncoderLoader": "encoder_name",
        "LoadImage": "image",
    }
    for node in workflow["nodes"]:
        widgets = node.get("widgets_values")
        if key := loaders.get(node["type"]):
            widgets[0] = names[key]
            node["properties"].pop("models", None)  # where to download the files that were named there
        elif node["type"] == "EmptyLatentImage":
            widgets[:2] = [SIZE, SIZE]
        elif node["type"] == "KSampler":
            widgets[2] = STEPS  # after the seed and what becomes of it
    return workflow


if __name__ == "__main__":
    _setup.run_main(main)
