"""What each part of GRACE is worth, in words."""

from __future__ import annotations

from qatbench.report.model import Comparison, TaskComparison
from qatbench.report.tables import PARTS, ablation_rows, markdown_table, of_task

METHOD = """\
- **what a part is worth**: a full grace arm minus the arm that only lacks the part, on the same \
grid, settings and seeds; also grace minus qat, and qat minus the best PTQ arm (picked on these \
same questions, which flatters PTQ). A pair that stands under Pairs too keeps the p it has there; \
the others, {family} in all, are a Holm family of their own: asking about parts does not weaken \
what is said of the arms. **by seed**: the difference of each seed; the interval does not cover \
the choice of seeds. **cost without it**: making the arm without the part over making the full \
one, on one kind of device.
- **verdict on a part**: "does not matter": equivalent within the margin, which is looked at \
first; "helps", "hurts": the interval lies above, below 0 and p (Holm) is below {alpha:.2g}; \
otherwise the questions that would settle it with 80 % power if the difference is the one seen."""

_TITLES = {
    "pair": "with - without",
    "diff": "difference, points",
    "p Holm": "p (Holm)",
    "cost": "cost without it",
}


def section(comparison: Comparison, task: TaskComparison) -> str:
    """The table of a task's ablations with what must be known beside it; "" without any."""
    rows = of_task(ablation_rows(comparison), task.definition.task)
    if not rows:
        return ""
    notes = [
        f"- {PARTS[ablation.part]}, `{ablation.pair.arm}` - `{ablation.pair.reference}`: the arms"
        f" also differ in {', '.join(ablation.differing)}."
        for ablation in task.ablations
        if ablation.differing
    ]
    notes += [f"- {sentence}." for sentence in task.not_ablated]
    return "\n\n".join(filter(None, [markdown_table(rows, _TITLES), "\n".join(notes)]))
