"""Where the pack's files live: encoders under models/nested_attention, saved subjects under output/nested_subjects."""

from __future__ import annotations

import logging
import os

import folder_paths

from ..nested_core.errors import NestedAttentionError

ENCODERS = "nested_attention"
SUBJECTS = "nested_subjects"

_EXTENSIONS = {ENCODERS: {".safetensors", ".bin", ".pt", ".pth"}, SUBJECTS: {".safetensors"}}


def subjects_output() -> str:
    """The folder that Save Subject writes below."""
    return os.path.join(folder_paths.get_output_directory(), SUBJECTS)


def register_folders() -> None:
    """Tell the host the two folders, beside those that the user's extra_model_paths.yaml already names."""
    encoders = os.path.join(folder_paths.models_dir, ENCODERS)
    folder_paths.add_model_folder_path(ENCODERS, encoders)
    folder_paths.add_model_folder_path(SUBJECTS, os.path.join(folder_paths.models_dir, SUBJECTS))
    folder_paths.add_model_folder_path(SUBJECTS, subjects_output())
    for name, extensions in _EXTENSIONS.items():
        paths, known = folder_paths.folder_names_and_paths[name]
        folder_paths.folder_names_and_paths[name] = (paths, set(known) | extensions)
    try:
        os.makedirs(encoders, exist_ok=True)  # so that people see where the file goes
    except OSError as error:
        logging.getLogger(__name__).info("models/%s could not be created: %s", ENCODERS, error)


def find(folder: str, name: str, what: str, advice: str) -> str:
    """The full path of a file that a picker offered.

    Raises NestedAttentionError naming the folders that were searched and the files that are there.
    """
    path = folder_paths.get_full_path(folder, name)
    if path is not None:
        return path
    folders = folder_paths.get_folder_paths(folder)
    # The host lists links whether or not anything is where they lead.
    links = {n: p for n in folder_paths.get_filename_list(folder) if (p := _dead_link(folders, n))}
    if name in links:
        raise NestedAttentionError(
            f"The {what} {name!r} is a link to {os.readlink(links[name])}, and nothing is there: put the file back (is "
            f"that disk connected?), or make the link anew. The link: {links[name]}"
        )
    present = [n for n in folder_paths.get_filename_list(folder) if n not in links]
    there = f"There: {', '.join(present)}." if present else "There is no such file yet."
    raise NestedAttentionError(f"No {what} named {name!r} in {', '.join(folders)}. {there} {advice}")


def _dead_link(folders: list[str], name: str) -> str | None:
    """The path of a listed file that is a link to nothing; None where one of the folders has it."""
    paths = [os.path.join(folder, name) for folder in folders]
    return None if any(map(os.path.exists, paths)) else next(filter(os.path.islink, paths), None)


def check_choice(folder: str, name: str | None, what: str, advice: str) -> bool | str:
    """For a node's validate_inputs: True, or `find`'s message. Naming an input there leaves its check to the node; the
    host's own says neither where it looked nor what to do."""
    if name is None:  # comes over a link, when the graph runs
        return True
    try:
        find(folder, name, what, advice)
    except NestedAttentionError as error:
        return str(error)
    return True


def content_marker(folder: str, name: str | None) -> str:
    """Changes when the file does, so that the host reads a replaced file and only that."""
    if name is None:  # comes over a link: the host's own cache key says what it is linked to
        return "linked"
    path = folder_paths.get_full_path(folder, name)
    if path is None:
        return "missing"
    stat = os.stat(path)
    return f"{stat.st_mtime_ns}:{stat.st_size}"
