"""Save Subject, Load Subject: a subject as a file of its own."""

from __future__ import annotations

import os

import folder_paths
from comfy_api.v0_0_2 import io, ui

from ..nested_core.errors import NestedAttentionError
from ..nested_core.hosts.comfy.values import HostEncoder, HostSubject
from ..nested_core.subject import load_subject, save_subject
from .encode import CLASS_WORD_TOOLTIP, PLACEHOLDER_TOOLTIP
from .folders import SUBJECTS, check_choice, content_marker, find, subjects_output
from .types import CATEGORY, NestedEncoder, NestedSubject

_ADVICE = "Save one with Save Subject, or copy a saved one into models/nested_subjects, then press R."


class NestedSaveSubject(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="NestedSaveSubject",
            display_name="Save Subject",
            category=CATEGORY,
            description=(
                "Writes a subject to output/nested_subjects, to be reused without its photos and without encoding "
                "again. A few megabytes; no picture is in it."
            ),
            search_aliases=["nested attention", "export", "store"],
            is_output_node=True,
            inputs=[
                NestedSubject.Input("subject", tooltip="From Encode Subject or Merge Subjects."),
                io.String.Input(
                    "filename_prefix",
                    default="subject",
                    tooltip="Beginning of the file's name, below output/nested_subjects. Folders (family/anna) and "
                    "%year%, %month%, %day% work.",
                ),
            ],
            outputs=[],
        )

    @classmethod
    def execute(cls, subject: HostSubject, filename_prefix: str) -> io.NodeOutput:
        base = subjects_output()
        if not filename_prefix.strip(" /\\."):
            raise NestedAttentionError('filename_prefix is empty: give the file a name, such as "anna".')
        # The host's own function raises a bare Exception for a prefix that leads out of the folder: say it first.
        if os.path.isabs(filename_prefix) or ".." in filename_prefix.replace("\\", "/").split("/"):
            raise NestedAttentionError(
                f'filename_prefix is "{filename_prefix}"; it must stay below {base}: use a name like "anna" or '
                '"family/anna".'
            )
        try:
            os.makedirs(base, exist_ok=True)
            folder, name, counter, subfolder, _ = folder_paths.get_save_image_path(filename_prefix, base)
        except OSError as error:  # "file exists", where a link leads nowhere
            raise NestedAttentionError(
                f"The folder for {filename_prefix!r} below {base} can't be used ({error.strerror or error}: "
                f"{error.filename}). If it is a link, put back what it leads to (is that disk connected?), or remove "
                "it; else check that it is a folder that can be written to."
            ) from error
        file = f"{name}_{counter:05}_.safetensors"
        save_subject(os.path.join(folder, file), subject.subject)
        return io.NodeOutput(ui=ui.PreviewText(f"Saved {os.path.join(SUBJECTS, subfolder, file)}"))


class NestedLoadSubject(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="NestedLoadSubject",
            display_name="Load Subject",
            category=CATEGORY,
            description="Loads a saved subject. It works with the encoder that made it, and with no other.",
            search_aliases=["nested attention", "import", "reuse"],
            inputs=[
                NestedEncoder.Input("encoder", tooltip="The encoder that the subject was made with."),
                io.Combo.Input(
                    "subject_name",
                    options=folder_paths.get_filename_list(SUBJECTS),
                    tooltip="A file of output/nested_subjects or models/nested_subjects. Press R after saving one.",
                ),
                io.String.Input(
                    "placeholder",
                    default="",
                    optional=True,
                    tooltip=f"Empty: the one it was saved with. {PLACEHOLDER_TOOLTIP}",
                ),
                io.String.Input(
                    "class_word",
                    default="",
                    optional=True,
                    tooltip=f"Empty: the one it was saved with. {CLASS_WORD_TOOLTIP}",
                ),
            ],
            outputs=[NestedSubject.Output(display_name="subject")],
        )

    @classmethod
    def validate_inputs(cls, subject_name: str | None) -> bool | str:
        return check_choice(SUBJECTS, subject_name, "saved subject", _ADVICE)

    @classmethod
    def fingerprint_inputs(cls, subject_name: str | None, **kwargs: object) -> str:
        return content_marker(SUBJECTS, subject_name)

    @classmethod
    def execute(
        cls, encoder: HostEncoder, subject_name: str, placeholder: str = "", class_word: str = ""
    ) -> io.NodeOutput:
        path = find(SUBJECTS, subject_name, "saved subject", _ADVICE)
        return io.NodeOutput(HostSubject(encoder, load_subject(path, encoder.config, placeholder, class_word)))
