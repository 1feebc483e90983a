"""Which question does a row of an answers file answer: by id, by content, or by its place."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from qatbench.errors import ArtifactError
from qatbench.records import LETTERS, Question
from qatbench.tasks.answers import Answer

Content = tuple[str, tuple[str, ...]]  # question, options


class Matched(NamedTuple):
    """What the file answers."""

    by_id: dict[str, Answer]  # question id -> the last answer to it
    unknown: list[Answer]  # to questions that are not asked
    repeated: int  # answers that a later one replaces
    other_options: int  # answers whose rows show other options than the data


def match(rows: Sequence[Answer], questions: Sequence[Question]) -> Matched:
    """Find the question of every row.

    Rows with an id go by it; those of ScienceQA tables and logs, whose ids are not the data set's,
    by question and options, equal ones in the order of the two files; logged samples by their place
    in the split where that fits, or where they hold no question. A gold answer that the file
    states has to agree.

    Raises: ArtifactError if rows cannot be told apart, none fits or a stated gold answer differs.
    """
    known = {question.id: question for question in questions}
    found = _pairs(rows, questions, known)
    by_id: dict[str, Answer] = {}
    unknown, repeated, other = [], 0, 0
    for name, row in found:
        if name is None or name not in known:
            unknown.append(row)
            continue
        _check_target(row, known[name])
        repeated += name in by_id
        other += _shows_other_options(row, known[name])
        by_id[name] = row
    if not by_id:
        raise ArtifactError(
            f"none of the {len(rows)} answers is to a question of the data, "
            f"the first is {rows[0].where}",
            hint="is it the right data and the right --split?",
        )
    return Matched(by_id, unknown, repeated, other)


def _pairs(
    rows: Sequence[Answer], questions: Sequence[Question], known: Mapping[str, Question]
) -> list[tuple[str | None, Answer]]:
    """(question id, row); an id may be unknown, None is a row that fits no question."""
    told = [row for row in rows if _content_of_row(row.row)]
    named = all(row.id is not None for row in rows)
    circular = questions[0].group is not None  # its ids are the data set's wherever they are
    if not circular and told and all(_in_place(row, questions) for row in rows):
        return [(_at(row.position, questions), row) for row in rows]
    if not circular and told and not (named and all(_agrees(row, known) for row in told)):
        return _by_content(rows, questions)
    if named:
        return [(row.id, row) for row in rows]
    return [(_at(row.position, questions), row) for row in rows]


def _check_target(row: Answer, question: Question) -> None:
    stated = row.target if row.target and len(row.target) == 1 else None
    if stated is not None and stated in LETTERS and stated != question.gold:
        raise ArtifactError(
            f"{row.where}: its gold answer is {stated}, that of question {question.id} is "
            f"{question.gold}",
            hint="another split or part of the data: try --split test:image",
        )


def _at(position: int | None, questions: Sequence[Question]) -> str | None:
    there = position is not None and 0 <= position < len(questions)
    return questions[position or 0].id if there else None


def _shows_other_options(row: Answer, question: Question) -> bool:
    """Whether one option differs that both have; writers of tables turn 1 into 1.0."""
    both = [(row.row[k], text) for k, text in question.options.items() if _there(row.row.get(k))]
    return any(
        _plain(mine).removesuffix(".0") != _plain(text).removesuffix(".0") for mine, text in both
    )


def _plain(text: object) -> str:
    return " ".join(str(text).replace("_x000D_", " ").split()).casefold()


def _content_of_row(row: Mapping[str, Any]) -> Content | None:
    """Question and options of a row, in the columns of a table or a ScienceQA record."""
    if not isinstance(row.get("question"), str):
        return None
    given = row.get("choices")
    if not isinstance(given, list | tuple):
        given = [row[letter] for letter in LETTERS if _there(row.get(letter))]
    return (_plain(row["question"]), tuple(map(_plain, given))) if given else None


def _there(cell: object) -> bool:
    return cell is not None and cell == cell and cell != ""


def _content(question: Question) -> Content:
    return _plain(question.text), tuple(map(_plain, question.options.values()))


def _agrees(row: Answer, known: Mapping[str, Question]) -> bool:
    """Whether a row's id names the question that the row holds; it may be a row number."""
    question = known.get(row.id or "")
    return question is not None and _content_of_row(row.row) == _content(question)


def _in_place(row: Answer, questions: Sequence[Question]) -> bool:
    """Whether the question at the row's place is the one that the row holds."""
    there = row.position is not None and 0 <= row.position < len(questions)
    return there and _content_of_row(row.row) == _content(questions[row.position or 0])


def _by_content(
    rows: Sequence[Answer], questions: Iterable[Question]
) -> list[tuple[str | None, Answer]]:
    asked: dict[Content, list[str]] = defaultdict(list)
    for question in questions:
        asked[_content(question)].append(question.id)
    given: dict[Content | None, dict[object, list[Answer]]] = defaultdict(lambda: defaultdict(list))
    # several answers to one row of the data stay together, in the order of the data
    for row in sorted(rows, key=lambda row: row.position or 0):
        given[_content_of_row(row.row)][row.id if row.position is None else row.position].append(
            row
        )
    found: list[tuple[str | None, Answer]] = []
    for content, some in given.items():
        names: Sequence[str | None] = asked.get(content, []) if content else []
        if not names:
            names = [None] * len(some)
        elif len(names) != len(some):
            first = next(iter(some.values()))[0]
            raise ArtifactError(
                f"{first.where}: {len(names)} questions of the data read like this one, "
                f"{len(some)} of the answers do",
                hint="name the part that was asked, e.g. --split test:image",
            )
        for name, mine in zip(names, some.values(), strict=True):
            found += [(name, row) for row in mine]
    return found
