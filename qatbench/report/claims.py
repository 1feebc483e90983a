"""Published claims beside the figures of a comparison, in words."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from qatbench.report.details import Claim
from qatbench.report.model import Comparison
from qatbench.report.tables import UNKNOWN, Row, markdown_table

_INTRO = """\
What is published, and what these arms say of it on these questions. A verdict is about the \
direction: figures of another model, data set or protocol are not expected to agree. \
**reproduced**: the direction is shown (p (Holm) below {alpha:.2g}). **contradicted**: the \
opposite is shown, or equivalence within ±{margin:g} points. **undecided**: neither. Where several \
arms fit, the best on these questions is taken."""


def claim_rows(comparison: Comparison) -> list[Row]:
    """One row a claim, none without claims."""
    return [
        {
            "id": claim.id,
            "claim": claim.claim,
            "source": claim.source,
            "published": claim.published,
            "here": claim.here or UNKNOWN,
            "verdict": claim.verdict,
            "reason": claim.reason,
        }
        for claim in comparison.claims
    ]


def section(comparison: Comparison) -> str:
    """A table of the claims that have a verdict, then the others by reason; "" without claims."""
    if not comparison.claims:
        return ""
    definition = comparison.tasks[0].definition
    intro = _INTRO.format(alpha=1 - definition.level, margin=100 * definition.margin)
    judged = [claim for claim in comparison.claims if claim.verdict != "not testable here"]
    rows = [
        {
            "claim": claim.claim,
            "published": f"{claim.published} ({claim.source})",
            "here": claim.here or UNKNOWN,
            "verdict": f"**{claim.verdict}**: {claim.reason}",
        }
        for claim in judged
    ]
    parts = [intro, _left(markdown_table(rows))]
    others = [claim for claim in comparison.claims if claim not in judged]
    if others:
        lines = "\n".join(_untested(others, [claim.here for claim in judged]))
        parts.append(f"**Not testable here**:\n\n{lines}")
    return "\n\n".join(filter(None, parts))


def _left(table: str) -> str:
    """Sentences read best from the left."""
    head, _, rest = table.partition("\n")
    rule, _, rows = rest.partition("\n")
    return "\n".join(filter(None, [head, rule.replace(":", ""), rows]))


def _untested(claims: Sequence[Claim], told: list[str]) -> Iterator[str]:
    """A point a reason, below it a line a claim with figures that were not told before."""
    reasons: dict[str, list[Claim]] = {}
    for claim in claims:
        reasons.setdefault(claim.reason, []).append(claim)
    for reason, mine in reasons.items():
        yield f"- {reason}"
        for claim in mine:
            known = not claim.here or any(claim.here in text for text in told)
            told.append(claim.here)
            yield f"  - {claim.claim} ({claim.published}){'' if known else f' Here {claim.here}.'}"
