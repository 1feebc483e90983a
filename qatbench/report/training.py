"""How trainings went: the figure's place in the report, the table, and what beta did."""

from __future__ import annotations

from collections.abc import Sequence

from qatbench.report.figures import TERMS, TRAINING_FIGURE, alt, drawn
from qatbench.report.model import Comparison, Course, Stretch
from qatbench.report.tables import UNKNOWN, Row, markdown_table

_TITLES = {"ce": "CE", "kd": "KD", "rcka": "RCKA", "gate": "gate", "beta": "beta"}


def paragraphs(comparison: Comparison) -> list[str]:
    """Lay out the section: a figure where curves were recorded, a table, what the terms are."""
    parts = []
    if drawn(comparison):
        parts.append(f"![{alt(comparison, TRAINING_FIGURE)}]({TRAINING_FIGURE})")
    return [*parts, markdown_table(course_rows(comparison.training), _TITLES), _terms(comparison)]


def course_rows(courses: Sequence[Course]) -> list[Row]:
    """Rows of the first, the middle and the last stretch of each training; terms that were on."""
    rows = [
        {
            "arm": course.arm if stretch is course.stretches[0] else "",
            "steps": f"{stretch.first}-{stretch.last}",
            **{term: _figure(getattr(stretch, term)) for term in TERMS},
        }
        for course in courses
        for stretch in _told(course)
    ]
    off = {term for term in TERMS if all(row[term] == UNKNOWN for row in rows)}
    return [{key: cell for key, cell in row.items() if key not in off} for row in rows]


def _told(course: Course) -> list[Stretch]:
    last = len(course.stretches) - 1
    return [course.stretches[k] for k in sorted({0, last // 2, last})]


def _figure(value: float | None) -> str:
    return UNKNOWN if value is None else f"{value:.3f}"


def _terms(comparison: Comparison) -> str:
    """What the terms are, and how far beta moved."""
    lines = [
        "Means over the steps named and over seeds; a band in the figure spans the seeds. **CE**:"
        " cross-entropy, nats a token. **KD**: distillation loss, nats. **RCKA**: 1 - CKA of visual"
        " tokens. **gate**: mean confidence gate. **beta**: weight of KD."
    ]
    for course in comparison.training:
        if course.beta_range is not None and course.beta_at_bound is not None:
            low, high = course.beta_range
            lines.append(
                f"- `{course.arm}`: beta moved between {low:.3g} and {high:.3g} and lay at one of"
                f" its bounds in {100 * course.beta_at_bound:.0f} % of the steps."
            )
    return "\n".join(lines)
