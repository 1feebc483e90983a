"""Response -> option letter or None, as the public MMBench evaluators read it.

As in `extract`, a letter that the question does not offer is None, and so is what an evaluator
would pass on to a judge or draw at random. lmms-eval was read at 75571cfe (2026-08-06), VLMEvalKit
at e8e78f05 (2026-08-18), GRACE at b73fa9b4 (2026-08-15).
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial

from qatbench.tasks import extract
from qatbench.tasks.extract import Options

Extract = Callable[[str, Options], str | None]

_API_FAILED = "Failed to obtain answer via API"
FOUR = "ABCD"  # the letters that lmms-eval and GRACE take from a row


def first_four(options: Options) -> dict[str, str]:
    """Leave out an option E, which some evaluators never read."""
    return {letter: text for letter, text in options.items() if letter in FOUR}


def grace(response: str, options: Options) -> str | None:
    """GRACE, eval_mmbench.py: the parser of its ScienceQA script, over A to D."""
    return extract.grace(response, first_four(options))


def _only(hits: list[str]) -> str | None:
    return hits[0] if len(hits) == 1 else None


def _by_text(response: str, options: Options) -> str | None:
    """The only option whose text, case aside, is a part of the response."""
    lower = response.lower()
    return _only([letter for letter, text in options.items() if text.lower() in lower])


# --- lmms-eval ----------------------------------------------------------------------------------

_LMMS_FORMS = (
    "{}.", "{},", "{}:", "{})", "{}).", "({})", "({}).", ":{}", ":{},", ":{}.", ":{})", ":{}).",
)  # fmt: skip
_CLOSING = ",.!?;:'\""  # taken off both ends, one mark after the other
_RANKED_FORMS = (("({})", 6), ("{}.", 5), ("{}:", 4), ("{})", 3), ("{} ", 2))
_NOUNS = ("answer", "correct answer", "best answer", "correct option", "best option", "choice",
          "correct choice")  # fmt: skip
_PHRASES = (
    *(f"{article}{noun} is" for noun in _NOUNS for article in ("the ", "")),
    "i choose", "i select", "i pick", "my answer is", "my choice is",
    "옵션", "정답은", "답은", "답:", "答案是", "答案为", "选", "答えは",
)  # fmt: skip


def lmms_openai(response: str, options: Options) -> str | None:
    """lmms-eval's mmbench_en_dev up to its judge: what the judge would be asked is None."""
    return _offered(_lmms_rules(response.strip(), _lmms_choices(options)), options)


def lmms_static(response: str, options: Options) -> str | None:
    """lmms-eval's mmbench_en_dev_static: the same rules, then the likeliest letter."""
    choices = _lmms_choices(options)
    found = _lmms_rules(response.strip(), choices) or _likeliest(response, sorted(choices))
    return _offered(found, options)


def _offered(letter: str | None, options: Options) -> str | None:
    return letter if letter in first_four(options) else None


def _lmms_choices(options: Options) -> dict[str, str]:
    """A to D as the hub's rows hold them: a missing option is the text "nan", and can match."""
    return {letter: options.get(letter, "nan") for letter in FOUR}


def _lmms_rules(response: str, choices: Options) -> str | None:
    """A letter by its form, E included, else an option by its text."""
    if _API_FAILED not in response:
        tokens = response.split()
        bare = _only([letter for letter in "ABCDE" if letter in tokens])
        if bare and not (bare == "A" and len(tokens) > 3):  # a lone A may be an article
            return bare
        for form in _LMMS_FORMS:
            if hit := _only([letter for letter in "ABCDE" if form.format(letter) in tokens]):
                return hit
    return _by_text(response, choices)


def _likeliest(response: str, letters: list[str]) -> str | None:
    """The letter in the form of the highest rank, and among those the last one.

    "I choose" and the like count what stands anywhere behind their first occurrence.
    """
    bare = response.strip()
    for mark in _CLOSING:
        bare = bare.strip(mark)
    text, bare = f" {bare} ", bare.strip()
    lower = text.lower()
    ends = [at + len(phrase) for phrase in _PHRASES if (at := lower.find(phrase)) >= 0]
    found = []  # (rank, position, letter)
    for letter in letters:
        found += [(rank, text.rfind(form.format(letter)), letter) for form, rank in _RANKED_FORMS]
        found += [(7, text.find(letter, end), letter) for end in ends]
        if bare.startswith(letter) and not bare[1:2].isalpha():
            found.append((10, 0, letter))
        if bare.endswith(letter) and not bare[-2:-1].isalpha():
            found.append((9, len(text), letter))
    found = [hit for hit in found if hit[1] >= 0]
    found = found or [(0, text.rfind(letter), letter) for letter in letters if letter in text]
    return max(found, key=lambda hit: hit[:2])[2] if found else None


# --- VLMEvalKit ---------------------------------------------------------------------------------

_REFUSALS = (
    "Sorry, I can't help with images of people yet.",
    "I can't process this file.",
    "I'm sorry, but without the image provided",
    "Cannot determine the answer",
)
_TO_SPACE = str.maketrans(dict.fromkeys(".()[],:;!*#{}", " "))
_ANSWER_IS = re.compile(r"answer\s+is\s+\**([ABCD])", re.IGNORECASE)
_MISSING = frozenset((
    "", "#N/A", "#N/A N/A", "#NA", "-1.#IND", "-1.#QNAN", "-NaN", "-nan", "1.#IND", "1.#QNAN",
    "<NA>", "N/A", "NA", "NULL", "NaN", "None", "n/a", "nan", "null",
))  # fmt: skip  # cells that pandas reads as missing
_XLSX_LONGEST = 32767  # characters of a cell
_XLSX_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f]")


def vlmevalkit(response: str, options: Options) -> str | None:
    """VLMEvalKit, exact matching since 2026-06-17."""
    return _vlmevalkit(response, options, sentence=True)


def vlmevalkit_verbose(response: str, options: Options) -> str | None:
    """VLMEvalKit with the environment variable VERBOSE: a lone A in a sentence is an article."""
    return _vlmevalkit(response, options, sentence=True, article=True)


def vlmevalkit_2025_08(response: str, options: Options) -> str | None:
    """VLMEvalKit, 2025-08-04 to 2026-06-16: "The answer is" has no rule of its own."""
    return _vlmevalkit(response, options)


def vlmevalkit_2024_03(response: str, options: Options) -> str | None:
    """VLMEvalKit, 2024-02-04 to 2025-08-03: a letter may stand anywhere in a text of any length."""
    return _vlmevalkit(response, options, anywhere=True)


def verbose(match: Extract) -> Extract:
    """One of the three matchings above with the environment variable VERBOSE."""
    return partial(
        _vlmevalkit,
        sentence=match is vlmevalkit,
        anywhere=match is vlmevalkit_2024_03,
        article=True,
    )


def via_tsv(match: Extract) -> Extract:
    """Match after predictions were written to .tsv and read back: a missing text is "nan"."""

    def extract(response: str, options: Options) -> str | None:
        kept = {letter: text for letter, text in options.items() if text not in _MISSING}
        return match("nan" if response in _MISSING else response, kept)

    return extract


def via_xlsx(match: Extract) -> Extract:
    """Match after the same by way of .xlsx, which also cuts long texts and spells out controls."""
    after = via_tsv(match)

    def extract(response: str, options: Options) -> str | None:
        cut = response[:_XLSX_LONGEST]
        return after(_XLSX_CONTROL.sub(lambda mark: f"_x{ord(mark[0]):04X}_", cut), options)

    return extract


def _vlmevalkit(
    response: str,
    options: Options,
    *,
    sentence: bool = False,
    article: bool = False,
    anywhere: bool = False,
) -> str | None:
    if _API_FAILED not in response:
        if any(refusal in response for refusal in _REFUSALS):
            return None
        tokens = response.translate(_TO_SPACE).split()
        present = [letter for letter in options if letter in tokens]
        if not present and "Z" in tokens:
            return None
        quantifier = article and len(present) == 1 and "A" in tokens and len(tokens) > 3
        lone = present[0] if len(present) == 1 and not quantifier else None
        if lone and (anywhere or tokens.index(lone) > len(tokens) - 5):
            return lone
        match = _ANSWER_IS.search(response) if sentence and not quantifier else None
        if match and match[1].upper() in options:
            return match[1].upper()
    if not anywhere and len(response.lower()) > 2 * sum(map(len, options.values())):
        return None
    return _by_text(response, options)
