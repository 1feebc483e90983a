"""What a protocol is: the fields of one, and what option mode scores."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

from qatbench.records import Question
from qatbench.tasks.protocols_prompts import IMAGE_MARK

VICUNA_V1 = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions. "
    "USER: {text} ASSISTANT:"
)
WRONG = "not right, and counted as unparsed"
DRAWN = "the original draws an option at random; here not right, and counted as unparsed"


@dataclass(frozen=True)
class Protocol:
    """How questions are put and answers are read under one name.

    `chat` is the text with "{text}" in it that the evaluator feeds to a LLaVA model. `mode` is how
    the evaluator itself asks; every protocol works in both modes.
    """

    name: str
    reason: str  # why it is as it is, for the report and the help
    prompt: Callable[[Question], str]  # user text, without an image mark
    extract: Callable[[str, Mapping[str, str]], str | None]  # (response, options by letter)
    max_new_tokens: int  # generate mode
    shows_options: bool  # whether the prompt lists them
    continuation: Callable[[Question, str], str]  # (question, letter) -> text scored, option mode
    chat: str | None = None  # None: the model's own template
    circular: bool = True  # False: every pass of a circular question is a question of its own
    tasks: tuple[str, ...] = ("scienceqa",)  # meant for; any protocol can be put to any task
    mode: Literal["options", "generate"] = "generate"
    unparsed: str = WRONG  # what becomes of a response without a letter
    choices: tuple[str, ...] = ()  # of `qatbench protocols NAME`: a reason for each choice

    def rendered(self, question: Question) -> str:
        """Put the prompt, with LLaVA's image mark, into `chat`; without one, just the prompt."""
        text = self.prompt(question)
        if self.chat is None:
            return text
        mark = f"{IMAGE_MARK}\n" if question.has_image else ""
        return self.chat.replace("{text}", mark + text)


def option_text(question: Question, letter: str) -> str:
    """A space and the option's text."""
    return f" {question.options[letter]}"


def bare_letter(question: Question, letter: str) -> str:
    """A space and the letter."""
    return f" {letter}"


def answer_sentence(question: Question, letter: str) -> str:
    """The sentence that ScienceQA's authors had GPT-3 write."""
    return f" The answer is {letter}"
