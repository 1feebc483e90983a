"""Evaluation protocols: the one prompt renderer and the one answer extractor per name.

A protocol fixes the user text, how a letter is read from a response, and what option mode scores.
`prompt` holds no image mark: where an image goes is the model's matter. Facts about the public
evaluators were read at the commits named in `extract`.

What option mode scores (`continuation`): the protocols that show lettered options score " A", with
a leading space. A text LM gets the prompt as it is, which ends in "." or ":", and the chat texts of
LLaVA and SmolVLM end in "ASSISTANT:" and "Assistant:"; after all of these the letter is a word of
its own. For a template that ends in a newline the caller strips the space.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from qatbench.errors import UsageError
from qatbench.records import Question
from qatbench.tasks import extract

LETTER_SUFFIX = "\nAnswer with the option's letter from the given choices directly."
IMAGE_MARK = "<image>"
VICUNA_V1 = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions. "
    "USER: {text} ASSISTANT:"
)


@dataclass(frozen=True)
class Protocol:
    """How questions are put and answers are read under one name.

    `chat` is the text with "{text}" in it that the evaluator feeds to a LLaVA model.
    """

    name: str
    reason: str  # why it is as it is, for the report and the help
    prompt: Callable[[Question], str]  # user text, without an image mark
    extract: Callable[[str, Mapping[str, str]], str | None]  # (response, options by letter)
    max_new_tokens: int  # generate mode
    shows_options: bool  # whether the prompt lists them
    continuation: Callable[[Question, str], str]  # (question, letter) -> text scored, option mode
    chat: str | None = None  # None: the model's own template

    def rendered(self, question: Question) -> str:
        """Put the prompt, with LLaVA's image mark, into `chat`; without one, just the prompt."""
        text = self.prompt(question)
        if self.chat is None:
            return text
        mark = f"{IMAGE_MARK}\n" if question.has_image else ""
        return self.chat.replace("{text}", mark + text)


def get(name: str) -> Protocol:
    """Look up a protocol.

    Raises: UsageError if there is none of that name; the hint lists those there are.
    """
    if name not in _PROTOCOLS:
        raise UsageError(f"unknown protocol {name!r}", hint=f"protocols: {', '.join(names())}")
    return _PROTOCOLS[name]


def names() -> list[str]:
    """List the names `get` knows, the recommended protocol first."""
    return list(_PROTOCOLS)


# --- prompts ------------------------------------------------------------------------------------


def _lines(question: Question, form: str) -> str:
    return "\n".join(form.format(letter, text) for letter, text in question.options.items())


def _qatbench_prompt(question: Question) -> str:
    hint = f"{question.hint}\n" if question.hint else ""
    return f"{hint}Question: {question.text}\nAnswer:"


def _llava_prompt(question: Question) -> str:
    context = f"Context: {question.hint}\n" if question.hint else ""
    text = f"{context}{question.text}\n{_lines(question, '{}. {}')}"
    text = text.replace("  ", " ").strip()  # one pass, as in the published question file
    return text.replace(IMAGE_MARK, "").strip() + LETTER_SUFFIX


def _lmms_prompt(question: Question) -> str:
    context = f"Context: {question.hint}\n" if question.hint else ""
    return f"{context}{question.text}\n{_lines(question, '{}. {}')}{LETTER_SUFFIX}"


def _grace_prompt(question: Question) -> str:
    hint = question.hint.strip()
    context = f"Context: {hint}\n" if hint else ""
    options = _lines(question, "({}) {}")
    return (
        f"{context}Question: {question.text.strip()}\nOptions:\n{options}"
        "\nAnswer with only the option letter."
    )


def _official_prompt(question: Question) -> str:
    options = " ".join(f"({letter}) {text}" for letter, text in question.options.items())
    context = question.hint.strip() or "N/A"
    text = f"Question: {question.text}\nContext: {context}\nOptions: {options}\nAnswer:"
    return text.replace("  ", " ").strip()


# --- what option mode scores --------------------------------------------------------------------


def _option_text(question: Question, letter: str) -> str:
    return f" {question.options[letter]}"


def _letter(question: Question, letter: str) -> str:
    return f" {letter}"


def _answer_sentence(question: Question, letter: str) -> str:
    return f" The answer is {letter}"


# --- the table ----------------------------------------------------------------------------------


_LMMS = Protocol(
    name="lmms-sqa",
    reason="lmms-eval's tasks scienceqa and scienceqa_img as scored since 2025-07-04.",
    prompt=_lmms_prompt,
    extract=extract.lmms,
    max_new_tokens=16,
    shows_options=True,
    continuation=_letter,
)

_TABLE = (
    Protocol(
        name="qatbench",
        reason="Scores the text of each option after the bare question, so models too small to "
        "use letters are above chance too, and no response has to be parsed.",
        prompt=_qatbench_prompt,
        extract=extract.text_match,
        max_new_tokens=64,  # the longest ScienceQA options are whole sentences
        shows_options=False,
        continuation=_option_text,
    ),
    Protocol(
        name="llava-sqa",
        reason="LLaVA's model_vqa_science.py and eval_science_qa.py with --single-pred-prompt, the "
        "source of the ScienceQA-IMG figures in the LLaVA-1.5 papers.",
        prompt=_llava_prompt,
        extract=extract.llava,
        max_new_tokens=1024,
        shows_options=True,
        continuation=_letter,
        chat=VICUNA_V1,
    ),
    _LMMS,
    replace(
        _LMMS,
        name="lmms-sqa@2024-07-30",
        reason="lmms-eval as scored from 2024-07-30 to 2025-07-03, when 'A. text' was wrong: about "
        "10 points lower than later figures for a model that answers so.",
        extract=extract.lmms_2024_07_30,
    ),
    replace(
        _LMMS,
        name="lmms-sqa@2024-01",
        reason="lmms-eval as scored before 2024-07-30, case-sensitive and without stripping.",
        extract=extract.lmms_2024_01,
    ),
    Protocol(
        name="grace-sqa",
        reason="GRACE's own evaluation/ScienceQA script; its parser takes the first letter of the "
        "upper-cased response that is on offer, so 'The answer is B' is A.",
        prompt=_grace_prompt,
        extract=extract.grace,
        max_new_tokens=8,
        shows_options=True,
        continuation=_letter,
    ),
    Protocol(
        name="scienceqa-official",
        reason="The ScienceQA authors' GPT-3 script, input format QCM, here without its few-shot "
        "examples and captions; an unparsed response is counted as such, not drawn at random.",
        prompt=_official_prompt,
        extract=extract.scienceqa_official,
        max_new_tokens=512,
        shows_options=True,
        continuation=_answer_sentence,
    ),
)

_PROTOCOLS: dict[str, Protocol] = {protocol.name: protocol for protocol in _TABLE}
