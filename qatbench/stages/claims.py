"""Published claims beside this comparison's figures: the verdict on each is computed here.

A claim is looked at on each task (and grid) where it can be tested:

- reproduced: the claimed direction is shown by the adjusted p-values.
- contradicted: the opposite is shown, or equivalence within the margin.
- undecided: neither.
- not testable here: model, task, images, arms, a stated pair or a measurement is missing. What was
  measured of the general form is told, without a verdict.

Over several tasks or grids, those where it cannot be tested have no say. All reproduce: reproduced.
Some reproduce and some do not: undecided. None reproduces and one contradicts: contradicted.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from qatbench.report.details import Claim, ClaimVerdict
from qatbench.report.model import Definition, TaskComparison
from qatbench.stages.claim_findings import NOT_TESTABLE, Finding, findings
from qatbench.stages.claim_rules import (
    MemoryTest,
    Needs,
    Published,
    SpeedTest,
    Test,
    published,
)
from qatbench.stages.claim_speed import memory_finding, speed_finding

_NAMES = {"scienceqa": "ScienceQA", "mmbench": "MMBench"}
_OF_ONE_TASK = (MemoryTest, SpeedTest)  # bytes and speed do not depend on the questions


def verdicts(tasks: Sequence[TaskComparison], baseline: str) -> tuple[Claim, ...]:
    """Judge every published claim, in the order of claims.yaml; p-values are adjusted already."""
    return tuple(_claim(one, tasks, baseline) for one in published())


def _claim(one: Published, tasks: Sequence[TaskComparison], baseline: str) -> Claim:
    asked, unmet = _asked(one.test.needs, tasks)
    if isinstance(one.test, _OF_ONE_TASK):
        asked = asked[:1]
    found = [
        finding._replace(task=task.definition.task if len(asked) > 1 else "")
        for task in asked
        for finding in _findings(task, one.test, baseline)
    ]
    here = _joined([(finding, finding.here) for finding in found])
    verdict, reason = (NOT_TESTABLE, unmet) if unmet else _together(found)
    names = {_name(task) for task in tasks}
    missing = [_NAMES.get(name, name) for name in one.test.needs.tasks if name not in names]
    if verdict != NOT_TESTABLE and missing:
        reason += f"; {' and '.join(missing)} was not asked"
    facts = one.model_dump(include={"id", "claim", "source", "published"})
    return Claim(**facts, verdict=verdict, here=here, reason=reason)


def _findings(task: TaskComparison, test: Test, baseline: str) -> list[Finding]:
    """What one task says, a finding a grid."""
    if isinstance(test, MemoryTest):
        return [memory_finding(task, test)]
    if isinstance(test, SpeedTest):
        return [speed_finding(task, test)]
    return findings(task, test, baseline)


def _together(found: Sequence[Finding]) -> tuple[ClaimVerdict, str]:
    """One verdict over tasks and grids, as the module says."""
    tested = [finding for finding in found if finding.verdict != NOT_TESTABLE]
    told = {finding.verdict for finding in tested}
    verdict: ClaimVerdict = NOT_TESTABLE
    if told == {"reproduced"}:
        verdict = "reproduced"
    elif "contradicted" in told and "reproduced" not in told:
        verdict = "contradicted"
    elif told:
        verdict = "undecided"
    reason = _joined([(f, f.reason) for f in tested or found], alone=False)
    others = [(f, f.reason) for f in found if f.verdict == NOT_TESTABLE]
    return verdict, f"{reason}; not tested: {_joined(others)}" if tested and others else reason


def _joined(parts: Sequence[tuple[Finding, str]], *, alone: bool = True) -> str:
    """Each text once, after the tasks and grids that it is about; a single one too if `alone`."""
    where: dict[str, list[str]] = {}
    for finding, text in parts:
        if text:
            place = ", ".join(filter(None, [finding.task, finding.grid]))
            where.setdefault(text, []).append(place)
    if len(where) == 1 and not alone:
        return next(iter(where))
    told = [(" and ".join(dict.fromkeys(filter(None, p))), text) for text, p in where.items()]
    return "; ".join(f"{place}: {text}" if place else text for place, text in told)


def _asked(needs: Needs, tasks: Sequence[TaskComparison]) -> tuple[Sequence[TaskComparison], str]:
    """The tasks to look at, and why the claim cannot be tested on any of them; "" if it can."""
    named = [t for t in tasks if not needs.tasks or _name(t) in needs.tasks]
    if needs.model is not None and (why := _other_model(needs.model, tasks)):
        return named or tasks, why
    if not named:
        wanted = " and ".join(_NAMES.get(name, name) for name in needs.tasks)
        asked = ", ".join(task.definition.task for task in tasks)
        return tasks, f"it is about {wanted}; asked here: {asked}"
    pictured = [t for t in named if not needs.images or t.definition.text_only is False]
    return (pictured, "") if pictured else (named, _no_images(named[0].definition))


def _name(task: TaskComparison) -> str:
    return task.definition.task.split(":")[0]


def _other_model(wanted: str, tasks: Sequence[TaskComparison]) -> str:
    names = dict.fromkeys(name for task in tasks for name in task.definition.model)
    if not names:
        return f"it is about {wanted}; which model was compared is not recorded"
    if all(_plain(wanted) in _plain(name) for name in names):
        return ""
    return f"it is about {wanted}; compared here: {', '.join(f'`{name}`' for name in names)}"


def _plain(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())


def _no_images(definition: Definition) -> str:
    if definition.images != ("shown",):
        return "it is about images, and they were left out or swapped here"
    if definition.text_only:
        return "it is about images, and no question here has one"
    return "it is about images, and whether the questions here have any is not recorded"
