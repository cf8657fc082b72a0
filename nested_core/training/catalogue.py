"""What there is to train on: which pictures, of whom, with which captions; and what is wrong with it."""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import NestedAttentionError
from ..prompt import Placeholder, PromptReader
from .config import DataConfig
from .references import Place, place_of
from .sources import LAYOUT, Sample, read_samples

_KOHYA = re.compile(r"(\d+)_(.*\S)\s*")


@dataclass
class Picture:
    """A picture that examples are made of: its captions, and who is in it by placeholder."""

    sample: Sample
    captions: list[str]
    subjects: dict[str, str]
    several: bool


@dataclass
class Problem:
    """What stops a training. what: the kind, a sentence; cases: where, one line each; advice: what to do."""

    what: str
    cases: list[str] = field(default_factory=list)
    advice: str = ""

    def __str__(self) -> str:
        more = f"\n  and {len(self.cases) - 10} more" if len(self.cases) > 10 else ""
        return "\n  ".join([self.what, *self.cases[:10]]) + more + (f"\n{self.advice}" if self.advice else "")


class Catalogue:
    """The samples of folders and shards as pictures of subjects.

    pictures: what examples are made of. views: by subject, the pictures of it alone: what references are taken from.
    classes: by subject, what it is. places: by sample, where its subject is. problems: what stops a training.

    Raises NestedAttentionError for what can't be read at all, as `read_samples`.
    """

    def __init__(self, config: DataConfig) -> None:
        self.config = config
        self.samples = read_samples(config)
        self.problems: list[Problem] = []
        self.classes: dict[str, str] = {}
        self.places: dict[str, Place] = {}
        self.pictures: list[Picture] = []
        self.views: dict[str, list[Sample]] = defaultdict(list)
        self.homeless: list[str] = []  # pictures in no subject's folder
        self._words = {s.folder: s.text("txt") for s in self.samples.values() if s.name.rpartition("/")[2] == "class"}
        pictured = [sample for sample in self.samples.values() if sample.picture]
        if config.layout == "kohya":
            self._check_kohya(pictured)
        for sample in pictured:
            self._add(sample)
        self._check()

    def repeats(self, picture: Picture) -> int:
        """How often a picture is shown in an epoch: what the name of kohya's folder says, else once."""
        return _kohya(picture.sample)[0] if self.config.layout == "kohya" else 1

    def bindings(self, picture: Picture, caption: str) -> list[tuple[str, str, str]]:
        """(placeholder, class word, subject) of everyone a caption of the picture binds.

        The placeholder is the class word itself where the caption has that and no placeholder.
        """
        found = []
        for placeholder, name in picture.subjects.items():
            word = self.classes.get(name, "")
            if not picture.several and not _mentions(caption, placeholder):
                placeholder = word
            found.append((placeholder, word, name))
        return found

    def is_cut(self, sample: Sample) -> bool:
        """Whether anything says where in the picture the subject is, or what its reference is."""
        return sample.name in self.places or "mask.png" in sample.files or sample.reference is not None

    def uncut(self) -> list[str]:
        """Pictures of one subject each of which `is_cut` says no: cut to nothing, their reference is all of them."""
        return [p.sample.name for p in self.pictures if not (p.several or self.is_cut(p.sample))]

    def subject_by_view(self) -> dict[str, str]:
        """Of the pictures that show a subject alone: whose each is, by its name."""
        return {sample.name: subject for subject, views in self.views.items() for sample in views}

    # --- when made

    def subject_of(self, sample: Sample) -> str:
        """Who is in a picture; empty where nothing says so."""
        said = sample.said.get(self.config.subject_column)
        if said is not None and not isinstance(said, dict | list):
            return str(said)
        return sample.name if self.config.layout == "pictures" else sample.folder

    def _add(self, sample: Sample) -> None:
        subjects = self._several(sample)
        subject = self.subject_of(sample)
        if not subject and not subjects:
            self.homeless.append(sample.name)
            return
        if not subjects:
            self.views[subject].append(sample)
            self.classes.setdefault(subject, self._class_word(sample))
            place = place_of(sample.name, sample.said)
            if place is not None:
                self.places[sample.name] = place
        own = self._own_captions(sample)
        named = subjects or {self.config.placeholder: subject}
        picture = Picture(sample, own, named, bool(subjects))
        if not subjects:
            picture.captions = self._captions(picture, own)
        if picture.captions or subjects or "txt" in sample.files or "caption" in sample.files:
            self.pictures.append(picture)

    def _class_word(self, sample: Sample) -> str:
        said = sample.said.get(self.config.class_column)
        word = self._words.get(sample.folder) or (said if isinstance(said, str) else "")
        if not word and self.config.layout == "kohya":
            word = _kohya(sample)[1]
        return word or self.config.class_word

    def _several(self, sample: Sample) -> dict[str, str]:
        """Placeholder -> subject, where 01.json says that several are in a picture."""
        subjects = sample.said.get("subjects")
        if subjects is None or ("json" not in sample.files and not isinstance(subjects, dict)):
            return {}  # a table's column of that name may be anything
        if not (isinstance(subjects, dict) and subjects and all(isinstance(n, str) for n in subjects.values())):
            raise NestedAttentionError(
                f'{sample.name}.json: "subjects" should map placeholders to subject folders, as in '
                f'{{"<anna>": "anna", "<rex>": "rex"}}; got {json.dumps(subjects)}.'
            )
        return subjects

    def _own_captions(self, sample: Sample) -> list[str]:
        """What the picture's files, or else its row in a table, say of it."""
        lines: list[Any] = (sample.text("txt") or sample.text("caption")).splitlines()
        if not lines:
            said = sample.said.get(self.config.caption_column)
            lines = said if isinstance(said, list) else [said]
        return [line.strip() for line in lines if isinstance(line, str) and line.strip()]

    def _captions(self, picture: Picture, own: list[str]) -> list[str]:
        """Its own captions that mention the subject; where there are none, those made of `data.captions`."""
        config = self.config
        if not own and not config.captions and config.layout == "kohya":
            return [_kohya(picture.sample)[1]]  # as kohya's tools do
        word = self.classes[picture.subjects[config.placeholder]]
        silent = [
            caption for caption in own
            if not _mentions(caption, config.placeholder) and not (word and _mentions(caption, word))
        ]  # fmt: skip
        templates = [caption for caption in config.captions if ("{caption}" in caption) == bool(own)]
        if not templates or (own and not silent):
            return own
        made = [
            template.replace("{subject}", config.placeholder).replace("{caption}", caption)
            for template in templates
            for caption in silent or [""]
        ]
        return [caption for caption in own if caption not in silent] + made

    # --- what is wrong

    def _check_kohya(self, pictured: Iterable[Sample]) -> None:
        wrong = sorted({sample.folder or "(the data folder)" for sample in pictured if not _kohya(sample)[1]})
        if wrong:
            raise NestedAttentionError(
                'data.layout is "kohya": expected pictures in folders named by repeats and class word, as in '
                f'"10_golden retriever"; got {", ".join(wrong[:5])}. data.folders names the folder above them ("img"). '
                'For folders of other names use the layout "subjects".'
            )

    def _check(self) -> None:
        if not self.pictures:
            self.problems.append(Problem(self._nothing()))
            return
        alone = Problem("These pictures are of subjects that have no picture alone, to take references from:")
        wordless = Problem(
            "Nothing says what these subjects are:",
            [subject for subject in self.views if not self.classes[subject]],
        )
        silent = Problem(
            "These captions do not mention their subject, so there is no word to bind it to:",
            advice='Write it into them; or let data.captions do that: ["{subject}, {caption}"].',
        )
        if wordless.cases:
            first = next(sample for sample in self.views[wordless.cases[0]])
            place = f"{first.folder}/class.txt" if first.folder else "class.txt"
            wordless.advice = f'Write it into {place} ("dog"), or set data.class_word if all subjects are of one kind.'
        for picture in self.pictures:
            for name in picture.subjects.values():
                if not self.views.get(name):
                    alone.cases.append(
                        f'{picture.sample.name}: there is no picture of the subject "{name}" alone. Subjects with '
                        f"pictures: {', '.join(sorted(self.views)[:10]) or 'none'}."
                    )
            silent.cases += self._silent(picture)
        self.problems += [problem for problem in (wordless, alone, silent) if problem.cases]

    def _silent(self, picture: Picture) -> list[str]:
        if not picture.captions:
            return [f"{picture.sample.name}: no caption"]
        cases = []
        for caption in picture.captions:
            for placeholder, word, _ in self.bindings(picture, caption):
                if placeholder and not _mentions(caption, placeholder):
                    other = f"{self.config.placeholder} and no class word ({word})"
                    expected = " and ".join(picture.subjects) if picture.several else other
                    cases.append(f'{picture.sample.name}: "{caption}" has no {expected}')
        return cases

    def _nothing(self) -> str:
        config = self.config
        searched = [str(Path(folder).resolve()) for folder in config.folders] + list(config.shards)
        pictured = [sample for sample in self.samples.values() if sample.picture]
        said = (
            f"No captioned pictures of subjects in {', '.join(searched) or 'nothing: set data.folders or shards'}. "
            f"There are {len(self.samples)} samples, {len(pictured)} of them pictures"
        )
        if self.homeless:
            said += (
                f", {len(self.homeless)} of these in no subject's folder ({', '.join(self.homeless[:3])} ...). If each "
                'is of another subject, set data.layout to "pictures"'
            )
        columns = sorted({name for sample in pictured for name in sample.said})
        if columns:
            said += f". The columns that are said of them: {', '.join(columns)} (data.caption_column names the caption)"
        return f"{said}. {LAYOUT}"


def _kohya(sample: Sample) -> tuple[int, str]:
    """Repeats and class word of the folder that a picture lies in; (0, "") where its name has none."""
    found = _KOHYA.fullmatch(sample.folder.rpartition("/")[2])
    return (int(found[1]), found[2]) if found else (0, "")


def _mentions(caption: str, word: str) -> bool:
    """Whether a caption has a placeholder, or a plain word as a whole word."""
    return PromptReader([Placeholder(word, word)]).mentions_any(caption)
