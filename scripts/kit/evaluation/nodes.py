"""Makes the pictures of the evaluation in ComfyUI, through the nodes."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from .. import small_world
from ..graphs import Graph, Shown, node, run_graph, saved_pictures, subject_graph
from ..server import Server
from .cases import WITHOUT_SUBJECT, Bench, Case, Condition, Wanted


class Nodes(Bench):
    """Encode Subject, Apply Subject, Separate Subjects and the host's KSampler, in a running server."""

    sources = ("nested_core", "nodes", "demo/comfyui", "scripts/kit/graphs.py", "scripts/kit/evaluation/nodes.py")

    def __init__(
        self, server: Server, names: dict[str, str], encoders: dict[str, Path], identities: int, known: Path
    ) -> None:
        """names: of the small world's models. encoders: files in the server's models/nested_attention."""
        super().__init__(encoders, identities, known)
        self.server, self.names = server, names

    def pictures(self, condition: Condition, wanted: Sequence[Wanted]) -> Iterator[np.ndarray]:
        for case, number in tqdm(wanted, desc=f"{condition.encoder or condition.method}, in ComfyUI", mininterval=2):
            ran = asyncio.run(run_graph(self.server, self.graph(condition, case, number), True))
            (file,) = saved_pictures(self.server, ran)
            yield np.asarray(Image.open(file).convert("RGB"))
            file.unlink()

    def graph(self, condition: Condition, case: Case, number: int = 0) -> Graph:
        """Raises ValueError where a condition asks for what is only measured in diffusers."""
        usual = replace(condition, alpha=1.0, focus=1.0, views=1, negative="", word_first=False)
        if condition != usual or condition.method in ("decoupled", "drawn"):
            raise ValueError(f"{condition} is measured in diffusers.")
        entry = case.entry
        shown = small_world.write_portraits(entry.figures, self.server.input, 1, case.references)
        shown = [replace(subject, strength=condition.strength) for subject in shown]
        bound = condition.method not in WITHOUT_SUBJECT
        prompt = small_world.prompt(shown, entry.scene, entry.style, entry.looks, bound)
        subjects: Sequence[Shown] = shown if bound else ()
        names = {**self.names, "encoder_name": self.encoders[condition.encoder].name if bound else ""}
        graph = subject_graph(
            names, prompt, subjects, cfg=condition.cfg, seed=case.noise(number), prefix="evaluation/picture"
        )
        graph = {key: value for key, value in graph.items() if not key.startswith("seen")}
        if condition.separation:
            _separate(graph, condition.separation)
        if condition.apart:
            (sampler,) = [place for place in graph.values() if place["class_type"] == "KSampler"]
            inputs = {"model": sampler["inputs"]["model"], "strength": condition.apart}
            graph["apart"] = node("NestedSeparateSubjects", **inputs, start_percent=0.0, end_percent=1.0)
            sampler["inputs"]["model"] = ["apart", 0]
        return graph


def _separate(graph: Graph, separation: float) -> None:
    for place in graph.values():
        if place["class_type"] == "NestedApplySubject":
            place["class_type"] = "NestedApplySubjectAdvanced"
            place["inputs"] |= {
                "identity": 0.0, "focus": 1.0, "value_norm": "encoder's own", "layer_weights": "",
                "when_unmentioned": "stop", "separation": separation,
            }  # fmt: skip
