"""The user text of each published evaluator, without an image mark: Question -> str.

White space is kept or cleaned as each evaluator does it; where their code was read is said in
`extract` and `extract_mmbench`.
"""

from __future__ import annotations

from qatbench.records import Question
from qatbench.tasks.extract_mmbench import first_four

LETTER_SUFFIX = "\nAnswer with the option's letter from the given choices directly."
IMAGE_MARK = "<image>"


def _lines(question: Question, form: str = "{}. {}") -> str:
    return "\n".join(form.format(letter, text) for letter, text in question.options.items())


def qatbench(question: Question) -> str:
    """The bare question: options are not shown."""
    hint = f"{question.hint}\n" if question.hint else ""
    return f"{hint}Question: {question.text}\nAnswer:"


def llava_sqa(question: Question) -> str:
    """LLaVA's published question file for ScienceQA, with the single-prediction suffix."""
    context = f"Context: {question.hint}\n" if question.hint else ""
    text = f"{context}{question.text}\n{_lines(question)}"
    text = text.replace("  ", " ").strip()  # one pass, as in the published question file
    return text.replace(IMAGE_MARK, "").strip() + LETTER_SUFFIX


def lmms_sqa(question: Question) -> str:
    """lmms-eval's default format for ScienceQA."""
    context = f"Context: {question.hint}\n" if question.hint else ""
    return f"{context}{question.text}\n{_lines(question)}{LETTER_SUFFIX}"


def grace(question: Question) -> str:
    """GRACE's scripts for both tasks."""
    hint = question.hint.strip()
    context = f"Context: {hint}\n" if hint else ""
    options = _lines(question, "({}) {}")
    return (
        f"{context}Question: {question.text.strip()}\nOptions:\n{options}"
        "\nAnswer with only the option letter."
    )


def scienceqa_official(question: Question) -> str:
    """The ScienceQA authors' input format QCM, without examples."""
    options = " ".join(f"({letter}) {text}" for letter, text in question.options.items())
    context = question.hint.strip() or "N/A"
    text = f"Question: {question.text}\nContext: {context}\nOptions: {options}\nAnswer:"
    return text.replace("  ", " ").strip()


# --- MMBench ------------------------------------------------------------------------------------


def llava_mmbench(question: Question) -> str:
    """LLaVA's script for MMBench; it stops at the first of A to D that is missing."""
    hint = "" if _is_none(question.hint) else f"{question.hint}\n"
    options = ""
    for letter in "ABCD":
        if letter not in question.options or _is_none(question.options[letter]):
            break
        options += f"\n{letter}. {question.options[letter]}"
    return f"{hint}{question.text}{options}{LETTER_SUFFIX}"


def _is_none(text: str) -> bool:
    return text.lower() in ("", "nan", "none")


def lmms_mmbench(question: Question) -> str:
    """lmms-eval's English task; an empty line stands before the instruction."""
    hint = f"{question.hint} " if question.hint else ""
    return f"{hint}{question.text} There are several options:\n{_lines(question)}\n{LETTER_SUFFIX}"


def vlmevalkit(question: Question) -> str:
    """VLMEvalKit's default for a data set; its model wrappers may put it otherwise."""
    hint = f"Hint: {question.hint}\n" if question.hint else ""
    return (
        f"{hint}Question: {question.text}\nOptions:\n{_lines(question)}\n"
        "Please select the correct answer from the options above. \n"
    )


def grace_mmbench(question: Question) -> str:
    """GRACE's script for MMBench reads the columns A to D only."""
    return grace(question.model_copy(update={"options": first_four(question.options)}))
