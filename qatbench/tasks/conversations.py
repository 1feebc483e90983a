"""LLaVA-style conversations as training data: one JSON or JSONL file -> conversations.

The form is that of LLaVA's mix665k and of ShareGPT4V. Images come before the first question, as
LLaVA puts them; where the `<image>` marks stood in the text is not kept. A row that cannot be
trained on is told with file, row and reason, and counted; it is not fatal unless all rows are so.
`Chat` finds the answers in what a model's chat template makes of a conversation.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from qatbench.errors import ArtifactError, PrerequisiteError

IMAGE_MARK = "<image>"
_HALF = re.compile("[\ud800-\udfff]")  # no tokenizer takes such text
_MARKS = (f"{IMAGE_MARK}\n", f"\n{IMAGE_MARK}", IMAGE_MARK)
_ASKS, _ANSWERS = ("human", "user"), ("gpt", "assistant")
_FORMS = (("conversations", "from", "value"), ("messages", "role", "content"))
_HINT = (
    'a JSON list, or one JSON object a line, of {"id": ..., "image": "coco/x.jpg", '
    '"conversations": [{"from": "human", "value": "<image>\\n..."}, {"from": "gpt", "value": ...}]}'
)


class Turn(NamedTuple):
    """What is asked and what is answered; the answer is supervised."""

    asked: str
    answered: str


@dataclass(frozen=True, slots=True)
class Conversation:
    """One training sample of one turn or more; images come before the first question.

    Not a pydantic record: a common file holds three million turns.
    """

    id: str
    turns: tuple[Turn, ...]
    images: tuple[Path, ...] = ()

    def __post_init__(self) -> None:
        if not self.turns:
            raise ValueError("a conversation has at least one turn")


class Rejected(NamedTuple):
    """A row that was left out; `row` counts from 1: the item, or the line of a JSONL.

    `why` is one of a few reasons, to be counted by; `where` is what it is about in this row.
    """

    file: Path
    row: int
    why: str
    where: str = ""

    def __str__(self) -> str:
        tail = f" ({self.where})" if self.where else ""
        return f"{self.file.name}, row {self.row}: {self.why}{tail}"


class Loaded(NamedTuple):
    """What a file holds."""

    conversations: list[Conversation]
    rejected: list[Rejected]


class _BadRowError(Exception):
    """Why a row cannot be used, and what in it is meant."""


def load(path: Path, images: Path | None) -> Loaded:
    """Read conversations, in the order of the file.

    A row has `conversations` of `from` and `value`, or `messages` of `role` and `content`; `image`
    is a path below the folder `images`, or a list of them. Without an `id` it gets its row number.

    Raises: PrerequisiteError if the file or the folder of images is not there; ArtifactError if the
        file is no JSON or none of its rows can be used; the message has the first reason.
    """
    if images is not None and not images.is_dir():
        raise PrerequisiteError(f"no folder of images at {images}", hint="give the right folder")
    folder = None if images is None else _Folder(images)
    loaded = Loaded([], [])
    for number, row in _rows(path):
        try:
            loaded.conversations.append(_conversation(row, number, folder))
        except _BadRowError as bad:
            loaded.rejected.append(Rejected(path, number, *bad.args))
    if not loaded.conversations:
        why = f"; {loaded.rejected[0]}" if loaded.rejected else ""
        raise ArtifactError(
            f"none of the {len(loaded.rejected)} rows of {path} can be used{why}", hint=_HINT
        )
    return loaded


def _rows(path: Path) -> Iterator[tuple[int, Any]]:
    """Row numbers, from 1, and rows; a line of a JSONL that is no JSON comes as its error."""
    if not path.is_file():
        raise PrerequisiteError(f"no file of conversations at {path}", hint=_HINT)
    try:
        with path.open(encoding="utf-8-sig") as file:
            start = file.read(4096).lstrip()[:1]
            file.seek(0)
            if start != "{":
                items = json.load(file)
                if not isinstance(items, list):
                    raise ArtifactError(f"{path} is JSON, but no list of conversations", hint=_HINT)
                yield from enumerate(items, start=1)
                return
            for number, line in enumerate(file, start=1):
                if line.strip():
                    yield number, _object(line)
    except json.JSONDecodeError as error:
        where = f"line {error.lineno}, column {error.colno}"
        raise ArtifactError(f"{path} is not JSON: {error.msg}, {where}", hint=_HINT) from error
    except (UnicodeDecodeError, RecursionError) as error:
        raise ArtifactError(f"{path} is not JSON: {type(error).__name__}", hint=_HINT) from error
    except OSError as error:
        raise ArtifactError(f"cannot read {path}: {error.strerror}", hint=_HINT) from error


def _object(line: str) -> Any:
    """The JSON of one line, or a bad row's reason."""
    try:
        return json.loads(line)
    except (json.JSONDecodeError, RecursionError):
        return _BadRowError("not JSON")


def _conversation(row: Any, number: int, folder: _Folder | None) -> Conversation:
    if isinstance(row, _BadRowError):
        raise row
    if not isinstance(row, dict):
        raise _BadRowError(f"a {type(row).__name__}, not an object")
    turns, marks = _turns(row)
    images = _images(row, folder)
    if marks and marks != len(images):
        raise _BadRowError("image marks and images differ", f"{marks} and {len(images)}")
    name = row.get("id")
    return Conversation(str(number if name is None or name == "" else name), turns, images)


def _turns(row: dict[str, Any]) -> tuple[tuple[Turn, ...], int]:
    """Turns without their image marks, and how many marks there were."""
    key, role_key, text_key = next((form for form in _FORMS if row.get(form[0])), _FORMS[0])
    said = _said(row.get(key) or [], role_key, text_key)
    if not said:
        raise _BadRowError("no turns")
    if len(said) % 2:
        raise _BadRowError("the last turn has no answer")
    marks, turns = 0, []
    for at in range(0, len(said), 2):
        (asker, asked), (answerer, answered) = said[at], said[at + 1]
        turn_name = f"turn {at // 2 + 1}"
        if asker not in _ASKS or answerer not in _ANSWERS:
            raise _BadRowError("roles do not alternate", turn_name)
        if IMAGE_MARK in answered:
            raise _BadRowError("an image mark in the answer", turn_name)
        if IMAGE_MARK in asked:
            marks += asked.count(IMAGE_MARK)
            for mark in _MARKS:
                asked = asked.replace(mark, "")
        turn = Turn(asked.strip(), answered.strip())
        if not turn.asked or not turn.answered:
            raise _BadRowError(f"an empty {'answer' if turn.asked else 'question'}", turn_name)
        if any(map(_HALF.search, turn)):
            raise _BadRowError("half a surrogate pair", turn_name)
        turns.append(turn)
    return tuple(turns), marks


def _said(turns: Any, role_key: str, text_key: str) -> list[tuple[str, str]]:
    """(role, text) of each turn; an empty system turn before them is dropped."""
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        raise _BadRowError("turns are not a list of objects")
    said = [(turn.get(role_key), turn.get(text_key)) for turn in turns]
    if any(not isinstance(role, str) or not isinstance(text, str) for role, text in said):
        raise _BadRowError(f"a turn without {role_key} or {text_key} in text")
    if said and said[0][0] == "system" and said.pop(0)[1].strip():
        raise _BadRowError("a system turn: the model's own template decides it")
    return said


# --- images ---------------------------------------------------------------------------------------


def _images(row: dict[str, Any], folder: _Folder | None) -> tuple[Path, ...]:
    named = row.get("image")
    if named is None or named == "":
        return ()
    names = named if isinstance(named, list) else [named]
    if names and folder is None:
        raise _BadRowError("an image, but no folder of images was given")
    return tuple(folder.image(name) for name in names) if folder is not None else ()


class _Folder:
    """The folder of images; each folder below it is listed once, so that no file is looked up."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._known: dict[str, tuple[Path, frozenset[str]]] = {}

    def image(self, name: Any) -> Path:
        """The path of an image below the folder.

        Raises: _BadRowError when there is none, or the name leads out of the folder.
        """
        if not isinstance(name, str) or not name:
            raise _BadRowError("an image's name is not text")
        parts = name.replace("\\", "/").split("/")
        if os.path.isabs(name) or ".." in parts or ":" in parts[0]:
            raise _BadRowError("an image outside the folder of images", repr(name))
        head, _, tail = name.rpartition("/")
        if head not in self._known:
            self._known[head] = self._listed(head)
        folder, files = self._known[head]
        if tail not in files:
            raise _BadRowError("an image that is not there", repr(name))
        return folder / tail

    def _listed(self, head: str) -> tuple[Path, frozenset[str]]:
        folder = self.root / head
        try:
            with os.scandir(folder) as entries:
                return folder, frozenset(entry.name for entry in entries if entry.is_file())
        except (OSError, ValueError):  # not there, no folder, a name that no system allows
            return folder, frozenset()


# --- in a chat template ---------------------------------------------------------------------------

Said = tuple[str, str | None]  # asked, and answered where that is known


class UnusableError(Exception):
    """Why one sample cannot be trained on; others can."""


@dataclass(frozen=True)
class Chat:
    """A model's chat template and tokenizer.

    `render` puts turns into the template; where the last has no answer the text ends where that
    begins. `ends` are the tokens that end an answer; where the template ends one without any of
    them, `eos` is put there, as LLaVA's training does.
    """

    render: Callable[[Sequence[Said]], str]
    tokenize: Callable[[str], list[int]]
    ends: tuple[str, ...]
    eos: str

    def supervised(
        self, turns: Sequence[Turn], limit: int
    ) -> tuple[list[int], list[tuple[int, int]]]:
        """Tokens of a conversation, and where in them its answers are, each with its end.

        They stop with the first answer that ends `limit` tokens or more after the first prompt.

        Raises: ArtifactError when, in the template, a conversation does not continue the prompt of
            each of its answers; UnusableError when a token lies across a border.
        """
        whole, text, done = self.render(turns), "", 0
        tokens: list[int] = []
        spans: list[tuple[int, int]] = []
        for number, turn in enumerate(turns):
            before = self.render([*turns[:number], (turn.asked, None)])
            if len(before) < done or not whole.startswith(before):
                raise _broken()
            text += whole[done : len(before)]
            asked = self._tokens(text, tokens)
            said, done = self._said(whole, len(before), turn.answered)
            text += said
            tokens = self._tokens(text, asked)
            spans.append((len(asked), len(tokens)))
            if len(tokens) - spans[0][0] >= limit:
                break
        return tokens, spans

    def _said(self, whole: str, at: int, answered: str) -> tuple[str, int]:
        """What the model is to say from `at` on, its end included, and where that ends."""
        tail = whole[at:]
        if not tail.lstrip().startswith(answered):
            raise _broken()
        stop = tail.index(answered) + len(answered)
        after = tail[stop:].lstrip()
        end = next((end for end in self.ends if after.startswith(end)), None)
        if end is None:
            return tail[:stop] + self.eos, at + stop
        stop = tail.index(end, stop) + len(end)
        return tail[:stop], at + stop

    def _tokens(self, text: str, start: list[int]) -> list[int]:
        """Tokens of a text whose beginning has the tokens `start`."""
        tokens = self.tokenize(text)
        if tokens[: len(start)] != start or len(tokens) == len(start):
            raise UnusableError("the tokenizer does not separate an answer from what is around it")
        return tokens


def _broken() -> ArtifactError:
    return ArtifactError(
        "in the model's chat template a conversation does not continue the prompts of its answers",
        hint="train on questions, or give the model a template in which it does",
    )
