"""The recommended protocol, and those of the public ScienceQA evaluators."""

from __future__ import annotations

from dataclasses import replace

from qatbench.tasks import extract
from qatbench.tasks import protocols_prompts as prompts
from qatbench.tasks.protocols_kind import (
    DRAWN,
    VICUNA_V1,
    Protocol,
    answer_sentence,
    bare_letter,
    option_text,
)

_LMMS = Protocol(
    name="lmms-sqa",
    reason="lmms-eval's tasks scienceqa and scienceqa_img as scored since 2025-07-04.",
    prompt=prompts.lmms_sqa,
    extract=extract.lmms,
    max_new_tokens=16,
    shows_options=True,
    continuation=bare_letter,
)
LLAVA = Protocol(
    name="llava-sqa",
    reason="LLaVA's model_vqa_science.py and eval_science_qa.py with --single-pred-prompt, the "
    "source of the ScienceQA-IMG figures in the LLaVA-1.5 papers.",
    prompt=prompts.llava_sqa,
    extract=extract.llava,
    max_new_tokens=1024,
    shows_options=True,
    continuation=bare_letter,
    chat=VICUNA_V1,
)
GRACE = Protocol(
    name="grace-sqa",
    reason="GRACE's own evaluation/ScienceQA script; its parser takes the first letter of the "
    "upper-cased response that is on offer, so 'The answer is B' is A.",
    prompt=prompts.grace,
    extract=extract.grace,
    max_new_tokens=8,
    shows_options=True,
    continuation=bare_letter,
)
_OFFICIAL = Protocol(
    name="scienceqa-official",
    reason="The ScienceQA authors' GPT-3 script, input format QCM, here without its few-shot "
    "examples and captions; an unparsed response is counted as such, not drawn at random.",
    prompt=prompts.scienceqa_official,
    extract=extract.scienceqa_official,
    max_new_tokens=512,
    shows_options=True,
    continuation=answer_sentence,
    unparsed=DRAWN,
)

TABLE = (
    Protocol(
        name="qatbench",
        reason="Scores the text of each option after the bare question, so models too small to "
        "use letters are above chance too, and no response has to be parsed.",
        prompt=prompts.qatbench,
        extract=extract.text_match,
        max_new_tokens=64,  # the longest ScienceQA options are whole sentences
        shows_options=False,
        continuation=option_text,
        tasks=("scienceqa", "mmbench"),
        mode="options",
        unparsed="option mode leaves none; in generate mode not right, and counted",
        choices=(
            "Options are scored, not written: a comparison of checkpoints should measure what "
            "quantization did to the answers, not to their form.",
            "The text of an option is scored, not its letter: small models know an answer long "
            "before they can name it by a letter.",
            "Options are not listed in the prompt: a model that leans towards 'A' gains nothing.",
            "The mean log-probability of the option's tokens is compared, not the sum: long "
            "options would lose by their length alone.",
            "A tie goes to the first option and is counted: equal scores are a sign of rounding, "
            "and a report should show how many there are.",
            "A circular question counts once, right in every pass: guessing is not rewarded.",
        ),
    ),
    LLAVA,
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
    GRACE,
    _OFFICIAL,
    replace(
        _OFFICIAL,
        name="scienceqa-official-breakdown",
        reason="The ScienceQA authors' evaluate_acc.py: chosen indices over the test split, with "
        "accuracies by subject, context and grade; responses are read as by scienceqa-official.",
    ),
)
