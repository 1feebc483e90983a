"""A protocol laid open: what it does, on a question of our own."""

from __future__ import annotations

from typing import Any

from qatbench.records import Question
from qatbench.tasks.protocols_kind import Protocol

EXAMPLE = Question(
    id="example",
    task="scienceqa",
    text="What would you use to write on a blackboard?",
    options={"A": "a spoon", "B": "chalk", "C": "a blanket", "D": "cheese"},
    gold="B",
    hint="The picture shows a classroom.",
    image=b"-",
)
RESPONSES = (
    "B", "b", "B.", "(B)", "B. chalk", "The answer is B.", "The answer is B", "chalk",
    "Chalk, because it leaves a white line.", "A teacher uses chalk", "E", "I do not know", "",
)  # fmt: skip
COMBINATIONS = (
    "vlmevalkit-exact takes parts in any order: -circular or -vanilla, -via-xlsx or -via-tsv, "
    "@2025-08 or @2024-03, +VERBOSE."
)


def summary(protocol: Protocol) -> dict[str, Any]:
    """One protocol's facts: the row of a list."""
    return {
        "name": protocol.name,
        "reason": protocol.reason,
        "tasks": list(protocol.tasks),
        "mode": protocol.mode,
        "max_new_tokens": protocol.max_new_tokens,
        "circular": protocol.circular,
        "unit": _unit(protocol),
        "unparsed": protocol.unparsed,
        "choices": list(protocol.choices),
    }


def reasons(row: dict[str, Any]) -> list[str]:
    """A `summary` as lines: why it is there, why it is made so, what becomes of other responses."""
    told = [f"{row['name']}: {row['reason']}", *(f"  - {reason}" for reason in row["choices"])]
    return [*told, f"  without a letter: {row['unparsed']}"]


def _unit(protocol: Protocol) -> str:
    """What counts as one; a task without passes has questions only."""
    if "mmbench" not in protocol.tasks:
        return "question"
    return "circular question" if protocol.circular else "row"


def in_full(protocol: Protocol) -> dict[str, Any]:
    """Everything about one: its texts on the example, and what it reads in some responses."""
    return summary(protocol) | {
        "prompt": protocol.prompt(EXAMPLE),
        "chat": None if protocol.chat is None else protocol.rendered(EXAMPLE),
        "scored": {letter: protocol.continuation(EXAMPLE, letter) for letter in EXAMPLE.options},
        "options": dict(EXAMPLE.options),
        "extracted": [
            {"response": text, "letter": protocol.extract(text, EXAMPLE.options)}
            for text in RESPONSES
        ],
    }


def lines(found: dict[str, Any]) -> list[str]:
    """`in_full` as lines of text."""
    read = [f"  {one['response']!r:45} {one['letter'] or '-'}" for one in found["extracted"]]
    chat = found["chat"] or "the model's own template, the image first"
    return [
        f"{found['name']} ({', '.join(found['tasks'])})",
        found["reason"],
        *(f"- {reason}" for reason in found["choices"]),
        "",
        f"asked in {found['mode']} mode, up to {found['max_new_tokens']} new tokens",
        f"counted once: a {found['unit']}",
        f"a response without a letter: {found['unparsed']}",
        "",
        "prompt:",
        *_indented(found["prompt"]),
        "chat text:",
        *_indented(chat),
        "option mode compares:",
        *(f"  {letter}: {text!r}" for letter, text in found["scored"].items()),
        "read from a response (-: unparsed):",
        *read,
    ]


def _indented(text: str) -> list[str]:
    return [f"  | {line}" for line in text.split("\n")]
