"""The protocols of the public MMBench evaluators; VLMEvalKit's are used for ScienceQA too."""

from __future__ import annotations

import re
from dataclasses import replace

from qatbench.tasks import extract_mmbench
from qatbench.tasks import protocols_prompts as prompts
from qatbench.tasks.protocols_kind import Protocol, bare_letter
from qatbench.tasks.protocols_sqa import GRACE, LLAVA

_MMBENCH = ("mmbench",)

_VLMEVALKIT = Protocol(
    name="vlmevalkit-exact",
    reason="VLMEvalKit with its exact matching as since 2026-06-17: there is no judge, and an "
    "unmatched response is not right.",
    prompt=prompts.vlmevalkit,
    extract=extract_mmbench.vlmevalkit,
    max_new_tokens=2048,  # of its wrapper of LLaVA
    shows_options=True,
    continuation=bare_letter,
    tasks=("mmbench", "scienceqa"),
    unparsed="not right (its choice Z), and counted as unparsed",
)
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
    continuation=bare_letter,
    tasks=_MMBENCH,
)
_LMMS_OPENAI = replace(
    _LMMS_STATIC,
    name="lmms-mmbench-openai",
    reason="lmms-eval's mmbench_en_dev without its GPT judge: what would go to the judge is "
    "counted as unparsed, not drawn at random.",
    extract=extract_mmbench.lmms_openai,
    unparsed="goes to a GPT judge, then to a draw; here not right, and counted as unparsed",
)

TABLE = (
    replace(
        LLAVA,
        name="llava-mmbench",
        reason="LLaVA's model_vqa_mmbench.py for the prompt; its answers go to the benchmark's "
        "server, so here they are read as by vlmevalkit-exact.",
        prompt=prompts.llava_mmbench,
        extract=extract_mmbench.vlmevalkit,
        tasks=_MMBENCH,
    ),
    _LMMS_STATIC,
    _LMMS_OPENAI,
    replace(
        _LMMS_OPENAI,
        name="lmms-mmbench-openai(no API)",
        reason="The same as lmms-mmbench-openai, by the name of what happens without an API key.",
    ),
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
        extract=extract_mmbench.via_xlsx(extract_mmbench.vlmevalkit),
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
    *(
        replace(
            one,
            name=one.name.replace("-exact", "-exact-vanilla"),
            reason=f"{one.reason} Its .xlsx file included, every row is a question of its own.",
            extract=extract_mmbench.via_xlsx(one.extract),
            circular=False,
        )
        for one in (_VLMEVALKIT, _VLMEVALKIT_2025_08, _VLMEVALKIT_2024_03)
    ),
    replace(
        GRACE,
        name="grace-mmbench",
        reason="GRACE's own evaluation/MMBench script: the parser of grace-sqa, and plain accuracy "
        "over all rows, circular passes included.",
        prompt=prompts.grace_mmbench,
        extract=extract_mmbench.grace,
        circular=False,
        tasks=_MMBENCH,
    ),
)


# --- VLMEvalKit's parts, put together -----------------------------------------------------------

_PART = re.compile(r"-circular|-vanilla|-via-xlsx|-via-tsv|@2025-08|@2024-03|\+VERBOSE")
_DATED = {"@2025-08": _VLMEVALKIT_2025_08, "@2024-03": _VLMEVALKIT_2024_03}
_SAID = {
    "-circular": "This is its whole evaluation, its file included.",
    "-vanilla": "Its file included, every row is a question of its own.",
    "-via-xlsx": "Its .xlsx file lies between model and matching.",
    "-via-tsv": "A .tsv file lies between model and matching (PRED_FORMAT=tsv).",
    "+VERBOSE": "With the environment variable VERBOSE a lone A in a sentence is an article.",
}
_EITHER = (("-circular", "-vanilla"), ("-via-xlsx", "-via-tsv"), tuple(_DATED))


def combined(name: str) -> Protocol | None:
    """`vlmevalkit-exact` with parts in any order: a date, a file, a way of counting, VERBOSE.

    None if `name` is no such combination.
    """
    rest = name.removeprefix(_VLMEVALKIT.name)
    parts = _PART.findall(rest)
    doubled = len(set(parts)) < len(parts) or any(set(pair) <= set(parts) for pair in _EITHER)
    if rest == name or "".join(parts) != rest or doubled:
        return None
    base = next((_DATED[part] for part in parts if part in _DATED), _VLMEVALKIT)
    match = base.extract
    if "+VERBOSE" in parts:
        match = extract_mmbench.verbose(match)
    if "-via-tsv" in parts:
        match = extract_mmbench.via_tsv(match)
    elif any(part[0] == "-" for part in parts):  # its default file
        match = extract_mmbench.via_xlsx(match)
    reason = " ".join([base.reason, *(_SAID[part] for part in parts if part in _SAID)])
    counted = "-vanilla" not in parts
    return replace(base, name=name, reason=reason, extract=match, circular=counted)
