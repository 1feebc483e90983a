"""Evaluation protocols: the one prompt renderer and the one answer extractor per name.

A protocol fixes the user text, how a letter is read from a response, what option mode scores, and
whether the passes of a circular question count as one. `prompt` holds no image mark: where an image
goes is the model's matter. Facts about the public evaluators were read at the commits named in
`extract` and `extract_mmbench`.

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
from qatbench.tasks import extract, extract_mmbench
from qatbench.tasks import protocols_prompts as prompts
from qatbench.tasks.protocols_prompts import IMAGE_MARK

CHOICES = "choices"  # a form for training: `qatbench` with the options' texts before `Answer:`
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
    circular: bool = True  # False: every pass of a circular question is a question of its own

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


def with_answer(question: Question, name: str) -> tuple[str, str]:
    """(prompt, answer) of a question with a gold answer, by a protocol or in the form `choices`.

    Raises: UsageError if there is no protocol of that name.
    """
    protocol = get("qatbench" if name == CHOICES else name)
    text, answer = protocol.prompt(question), protocol.continuation(question, str(question.gold))
    if name == CHOICES:
        listed = "; ".join(question.options.values())
        text = text.removesuffix("Answer:") + f"Choices: {listed}\nAnswer:"
    return text, answer


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
    prompt=prompts.lmms_sqa,
    extract=extract.lmms,
    max_new_tokens=16,
    shows_options=True,
    continuation=_letter,
)
_LLAVA = Protocol(
    name="llava-sqa",
    reason="LLaVA's model_vqa_science.py and eval_science_qa.py with --single-pred-prompt, the "
    "source of the ScienceQA-IMG figures in the LLaVA-1.5 papers.",
    prompt=prompts.llava_sqa,
    extract=extract.llava,
    max_new_tokens=1024,
    shows_options=True,
    continuation=_letter,
    chat=VICUNA_V1,
)
_GRACE = Protocol(
    name="grace-sqa",
    reason="GRACE's own evaluation/ScienceQA script; its parser takes the first letter of the "
    "upper-cased response that is on offer, so 'The answer is B' is A.",
    prompt=prompts.grace,
    extract=extract.grace,
    max_new_tokens=8,
    shows_options=True,
    continuation=_letter,
)

_TABLE = (
    Protocol(
        name="qatbench",
        reason="Scores the text of each option after the bare question, so models too small to "
        "use letters are above chance too, and no response has to be parsed.",
        prompt=prompts.qatbench,
        extract=extract.text_match,
        max_new_tokens=64,  # the longest ScienceQA options are whole sentences
        shows_options=False,
        continuation=_option_text,
    ),
    _LLAVA,
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
    _GRACE,
    Protocol(
        name="scienceqa-official",
        reason="The ScienceQA authors' GPT-3 script, input format QCM, here without its few-shot "
        "examples and captions; an unparsed response is counted as such, not drawn at random.",
        prompt=prompts.scienceqa_official,
        extract=extract.scienceqa_official,
        max_new_tokens=512,
        shows_options=True,
        continuation=_answer_sentence,
    ),
)

_VLMEVALKIT = Protocol(
    name="vlmevalkit-exact",
    reason="VLMEvalKit with its exact matching as since 2026-06-17: there is no judge, and an "
    "unmatched response is not right.",
    prompt=prompts.vlmevalkit,
    extract=extract_mmbench.vlmevalkit,
    max_new_tokens=2048,  # of its wrapper of LLaVA
    shows_options=True,
    continuation=_letter,
)
_VIA_XLSX = extract_mmbench.via_xlsx(extract_mmbench.vlmevalkit)
_VLMEVALKIT_2025_08 = replace(
    _VLMEVALKIT,
    name="vlmevalkit-exact@2025-08",
    reason="VLMEvalKit as it matched from 2025-08-04 to 2026-06-16, when 'The answer is B' had to "
    "end the response.",
    extract=extract_mmbench.vlmevalkit_2025_08,
)
_VLMEVALKIT_2024_03 = replace(
    _VLMEVALKIT,
    name="vlmevalkit-exact@2024-03",
    reason="VLMEvalKit as it matched from 2024-02-04 to 2025-08-03, the source of most published "
    "figures: a lone letter counts wherever it stands.",
    extract=extract_mmbench.vlmevalkit_2024_03,
)
_LMMS_STATIC = Protocol(
    name="lmms-mmbench-static",
    reason="lmms-eval's mmbench_en_dev_static: what its rules leave open goes to a second parser "
    "that takes nearly any letter.",
    prompt=prompts.lmms_mmbench,
    extract=extract_mmbench.lmms_static,
    max_new_tokens=1024,
    shows_options=True,
    continuation=_letter,
)
_LMMS_OPENAI = replace(
    _LMMS_STATIC,
    name="lmms-mmbench-openai",
    reason="lmms-eval's mmbench_en_dev without its GPT judge: what would go to the judge is "
    "counted as unparsed, not drawn at random.",
    extract=extract_mmbench.lmms_openai,
)

_MMBENCH_TABLE = (
    replace(
        _LLAVA,
        name="llava-mmbench",
        reason="LLaVA's model_vqa_mmbench.py for the prompt; its answers go to the benchmark's "
        "server, so here they are read as by vlmevalkit-exact.",
        prompt=prompts.llava_mmbench,
        extract=extract_mmbench.vlmevalkit,
    ),
    _LMMS_STATIC,
    _LMMS_OPENAI,
    replace(_LMMS_OPENAI, name="lmms-mmbench-openai(no API)"),
    _VLMEVALKIT,
    _VLMEVALKIT_2025_08,
    _VLMEVALKIT_2024_03,
    replace(
        _VLMEVALKIT,
        name="vlmevalkit-exact+VERBOSE",
        reason="VLMEvalKit with the environment variable VERBOSE set, which makes a lone A in a "
        "sentence an article.",
        extract=extract_mmbench.vlmevalkit_verbose,
    ),
    replace(
        _VLMEVALKIT,
        name="vlmevalkit-exact-via-xlsx",
        reason="VLMEvalKit with its default .xlsx file between model and matching: an empty "
        "response comes back as 'nan', which can match an option.",
        extract=_VIA_XLSX,
    ),
    replace(
        _VLMEVALKIT,
        name="vlmevalkit-exact-via-tsv",
        reason="VLMEvalKit with a .tsv file between model and matching (PRED_FORMAT=tsv).",
        extract=extract_mmbench.via_tsv(extract_mmbench.vlmevalkit),
    ),
    *(
        replace(
            one,
            name=one.name.replace("-exact", "-exact-circular"),
            reason=f"{one.reason} This is its whole evaluation, the .xlsx file included.",
            extract=extract_mmbench.via_xlsx(one.extract),
        )
        for one in (_VLMEVALKIT, _VLMEVALKIT_2025_08, _VLMEVALKIT_2024_03)
    ),
    replace(
        _VLMEVALKIT,
        name="vlmevalkit-exact-vanilla",
        reason="VLMEvalKit, the .xlsx file included, with every row as a question of its own.",
        extract=_VIA_XLSX,
        circular=False,
    ),
    replace(
        _GRACE,
        name="grace-mmbench",
        reason="GRACE's own evaluation/MMBench script: the parser of grace-sqa, and plain accuracy "
        "over all rows, circular passes included.",
        prompt=prompts.grace_mmbench,
        extract=extract_mmbench.grace,
        circular=False,
    ),
)

_PROTOCOLS: dict[str, Protocol] = {
    protocol.name: protocol for protocol in (*_TABLE, *_MMBENCH_TABLE)
}
