"""Graphs as ComfyUI's API takes them: building the pack's main ones, running them, finding what they saved."""

from __future__ import annotations

import asyncio
import json
import urllib.error
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
from PIL import Image
from tqdm import tqdm

from .environment import SetupError, say
from .server import Server

Graph = dict[str, dict[str, Any]]


@dataclass(frozen=True)
class Shown:
    """A subject to encode: its reference pictures in the input folder, and the word it is bound to."""

    images: tuple[str, ...]
    placeholder: str
    class_word: str
    strength: float = 1.0


def node(kind: str, **inputs: Any) -> dict[str, Any]:
    """A node of a graph; a link is [node, output]."""
    return {"class_type": kind, "inputs": inputs}


def subject_graph(
    names: dict[str, str],
    prompt: str,
    subjects: Sequence[Shown],
    *,
    negative: str = "",
    size: int = 128,
    seed: int = 1,
    steps: int = 20,
    cfg: float = 4.0,
    batch: int = 1,
    prefix: str = "nested_attention/picture",
) -> Graph:
    """The graph of workflows/first_portrait.json with as many subjects as given; with none, the same without our nodes.

    names  file names by input: "ckpt_name", "clip_name", "encoder_name"
    """
    graph = {"checkpoint": node("CheckpointLoaderSimple", ckpt_name=names["ckpt_name"])}
    model, clip = ["checkpoint", 0], ["checkpoint", 1]
    if subjects:
        graph["tower"] = node("CLIPVisionLoader", clip_name=names["clip_name"])
        graph["encoder"] = node(
            "NestedEncoderLoader",
            encoder_name=names["encoder_name"],
            image_features="auto",
            value_norm="auto",
            alpha=0.0,
            pooled="auto",
        )
    for i, subject in enumerate(subjects):
        graph |= _encode(f"{i}", subject)
        graph[f"apply{i}"] = node(
            "NestedApplySubject",
            model=model,
            clip=clip,
            subject=[f"subject{i}", 0],
            strength=subject.strength,
            start_percent=0.0,
            end_percent=1.0,
        )
        model, clip = [f"apply{i}", 0], [f"apply{i}", 1]
    return graph | {
        "positive": node("CLIPTextEncode", clip=clip, text=prompt),
        "negative": node("CLIPTextEncode", clip=clip, text=negative),
        "latent": node("EmptyLatentImage", width=size, height=size, batch_size=batch),
        "sampler": _sampler(model, seed=seed, steps=steps, cfg=cfg),
        "decode": node("VAEDecode", samples=["sampler", 0], vae=["checkpoint", 2]),
        "save": node("SaveImage", images=["decode", 0], filename_prefix=prefix),
    }


def _sampler(model: Sequence[Any], **how: float) -> Any:
    return node(
        "KSampler",
        model=model,
        positive=["positive", 0],
        negative=["negative", 0],
        latent_image=["latent", 0],
        sampler_name="euler",
        scheduler="normal",
        denoise=1.0,
        **how,
    )


def _encode(number: str, subject: Shown) -> Graph:
    """Load Image for each view (batched where there are several), Encode Subject, and a preview of what it saw."""
    views = {f"photo{number}_{i}": node("LoadImage", image=image) for i, image in enumerate(subject.images)}
    first, *others = views
    picture: list[Any] = [first, 0]
    batches = {}
    for i, other in enumerate(others):
        batches[f"batch{number}_{i}"] = node("ImageBatch", image1=picture, image2=[other, 0])
        picture = [f"batch{number}_{i}", 0]
    return {
        **views,
        **batches,
        f"subject{number}": node(
            "NestedEncodeSubject",
            encoder=["encoder", 0],
            clip_vision=["tower", 0],
            image=picture,
            placeholder=subject.placeholder,
            class_word=subject.class_word,
            fit="crop",
        ),
        f"seen{number}": node("PreviewImage", images=[f"subject{number}", 1]),
    }


def check_nodes(server: Server, graph: Graph) -> None:
    """Raises SetupError, with what the server's log says about it, if the server lacks a node of the graph."""
    known = server.request("/object_info", timeout=120)
    if unknown := sorted({node["class_type"] for node in graph.values()} - known.keys()):
        raise SetupError(
            f"ComfyUI runs, but has no node {', '.join(unknown)}: the pack was not loaded, or only in part.\n"
            f"{server.log_tail(60)}"
        )


async def run_graph(server: Server, graph: Graph, quiet: bool = False) -> dict[str, Any]:
    """Queues a graph and follows it to its end, with a progress bar unless `quiet`. Returns its outputs by node.

    Raises SetupError with the node and its message if the graph is refused or fails, or if the server ends.
    """
    client = uuid.uuid4().hex
    done: set[str] = set()
    layout = "{desc:<38} {bar:30} {n_fmt}/{total_fmt} {elapsed}"
    with tqdm(total=len(graph), unit="node", bar_format=layout, disable=quiet or None) as bar:

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
                    if bar.disable and not quiet:  # not a terminal: a line per node in place of the bar
                        say(_title(graph, running))
                elif kind == "progress":
                    bar.set_description_str(f"{_title(graph, running)} {data['value']}/{data['max']}")
                elif kind == "executing":  # no node: all is over, and in the history
                    bar.set_description_str("done")
                    finished(graph)
                    break
                elif kind == "execution_error":
                    bar.close()
                    raise SetupError(failure_of(data, server))
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
    raise SetupError(refusal_of(answer.get("error", {}).get("message", answer), answer.get("node_errors") or {}))


def refusal_of(message: Any, node_errors: dict[str, Any]) -> str:
    """What the host has against a graph, its nodes' errors as the host lists them."""
    lines = [f"ComfyUI refused the graph: {message}"]
    for node, wrong in node_errors.items():
        for error in wrong["errors"]:
            lines.append(f"  {wrong['class_type']} ({node}): {error['message']}: {error['details']}")
    return "\n".join(lines)


def _title(graph: Graph, node: str | None) -> str:
    return f"{graph[node]['class_type']} ({node})" if node in graph else "start"


def failure_of(data: dict[str, Any], server: Server) -> str:
    """What the host says of a node that failed: its "execution_error"."""
    kind = str(data.get("exception_type")).rpartition(".")[2]
    return (
        f"{data.get('node_type')} ({data.get('node_id')}) failed with {kind}:\n"
        f"    {str(data.get('exception_message')).strip()}\n"
        f"Where in the code, the server's log says: {server.log}"
    )


def picture_file(server: Server, image: dict[str, str]) -> Path:
    """Where a picture of a node's output lies: saved, a preview, or from the input folder."""
    return server.work / image["type"] / image["subfolder"] / image["filename"]


def saved_pictures(server: Server, outputs: dict[str, Any]) -> list[Path]:
    """The files that SaveImage nodes wrote. Raises SetupError if there are none, or one is of a single colour."""
    images = [image for output in outputs.values() for image in output.get("images", [])]
    files = [picture_file(server, image) for image in images if image["type"] == "output"]
    if not files or not all(file.is_file() for file in files):
        raise SetupError(f"The graph ran, but saved no picture in {server.output}. {server.log_tail()}")
    for file in files:
        with Image.open(file) as picture:
            if all(low == high for low, high in picture.convert("RGB").getextrema()):
                raise SetupError(f"{file} is of one single colour: NaN in the models is the usual cause.")
    return files
