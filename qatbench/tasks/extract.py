"""Response -> option letter or None, one function per published evaluator.

Each gives what the evaluator's own code would score, its oddities included ("The answer is
Cheyenne." is C for LLaVA, "I choose B" is C for GRACE): a number is comparable with a published one
only if the same answers count. A letter that the question does not offer is None. Where an
evaluator draws at random, None is returned, and the question counts as unparsed.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

Options = Mapping[str, str]  # letter -> text, in order

_ANSWER_IS = re.compile(r"The answer is ([A-Z]).")  # any one character but newline must follow


def _offered(letter: str, options: Options) -> str | None:
    return letter if letter in options else None


def text_match(response: str, options: Options) -> str | None:
    """Choose the option whose text is the answer: first line only, case and a final stop aside.

    Options are reduced in the same way; if two become equal, neither can be chosen.
    """
    wanted = _reduced(response)
    hits = [letter for letter, text in options.items() if wanted and _reduced(text) == wanted]
    return hits[0] if len(hits) == 1 else None


def _reduced(text: str) -> str:
    line = text.strip().partition("\n")[0].strip()
    return line.removesuffix(".").rstrip().casefold()


def llava(response: str, options: Options) -> str | None:
    """LLaVA, eval_science_qa.py at c121f043; the response is taken as it is, not stripped."""
    if response in ("A", "B", "C", "D", "E"):
        return _offered(response, options)
    if len(response) >= 3 and response[0] in "ABCDE" and response[1:3] == ". ":
        return _offered(response[0], options)
    return answer_is(response, options)


def scienceqa_official(response: str, options: Options) -> str | None:
    """ScienceQA, run_gpt3.py at 2cbf8318: the sentence only; else it draws, here None."""
    return answer_is(response.strip(), options)


def answer_is(response: str, options: Options) -> str | None:
    """Read the letter of "The answer is X.", if that sentence occurs exactly once."""
    hits = _ANSWER_IS.findall(response)
    return _offered(hits[0], options) if len(hits) == 1 else None


def lmms(response: str, options: Options) -> str | None:
    """lmms-eval, scienceqa/utils.py since 2025-07-04: the bare letter in any case, or "X."."""
    response = response.strip()
    for letter in options:
        if response.lower() == letter.lower():
            return letter
    return _letter_stop(response, options)


def lmms_2024_07_30(response: str, options: Options) -> str | None:
    """lmms-eval, 2024-07-30 to 2025-07-03: lower-cased first, so only a bare letter counts."""
    response = response.strip().lower()
    return next((letter for letter in options if response == letter.lower()), None)


def lmms_2024_01(response: str, options: Options) -> str | None:
    """lmms-eval before 2024-07-30: case-sensitive and not stripped."""
    if response in options:
        return response
    return _letter_stop(response, options)


def _letter_stop(response: str, options: Options) -> str | None:
    if len(response) >= 2 and response[0].isupper() and response[1] == ".":
        return _offered(response[0], options)
    return None


def grace(response: str, options: Options) -> str | None:
    """GRACE, eval_scienceqa.py at b73fa9b4: the first character that is a letter on offer.

    The whole response is upper-cased first, so any word may hold the letter.
    """
    return next((char for char in response.strip().upper() if char in options), None)
