"""Table rows as formatted strings, shared by report.md, the CSV files and the terminal.

A row is a dict from a short key to a cell; all rows of one table have the same keys in the same
order. "-" stands for what was not recorded. Accuracies are percent, differences points.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from qatbench.records_speed import Spread
from qatbench.report.model import Ablation, ArmResult, Comparison, PairResult, Part, TaskComparison
from qatbench.report.speed_model import SpeedCase, cases, memory

Row = dict[str, str]
UNKNOWN = "-"
PARTS: dict[Part, str] = {
    "gate": "confidence gate",
    "kl": "decoupled KL with its gate",
    "kd": "distillation of tokens",
    "rcka": "RCKA",
    "beta": "adaptive beta",
    "teacher": "teacher",
    "tokens": "choice of distilled tokens",
    "distillation": "all of distillation (grace over qat)",
    "training": "training on the grid (qat over the best PTQ)",
}


def arm_rows(comparison: Comparison) -> list[Row]:
    """One row an arm and task; without its task, a row fits 100 columns of a terminal."""
    return [
        {"task": task.definition.task, **_arm_row(task, arm, comparison.baseline)}
        for task in comparison.tasks
        for arm in task.arms
    ]


def pair_rows(comparison: Comparison) -> list[Row]:
    """One row a pair and task: arms against the baseline, then best QAT against best PTQ a grid."""
    return [
        {"task": task.definition.task, **_pair_row(pair)}
        for task in comparison.tasks
        for pair in stated_pairs(task)
    ]


def stated_pairs(task: TaskComparison) -> list[PairResult]:
    """List the pairs, with the contests that are not among them, either way round."""
    known = [{pair.arm, pair.reference} for pair in task.pairs]
    new = [pair for pair in task.contests if {pair.arm, pair.reference} not in known]
    return [*task.pairs, *new, *task.claimed]


def seed_rows(task: TaskComparison) -> list[Row]:
    """One row an arm: what each of its seeds scored."""
    return [
        {
            "arm": arm.name,
            "seeds": ", ".join(map(str, arm.seeds)),
            "right": ", ".join(map(str, arm.right)),
            "accuracy %": ", ".join(percent(accuracy) for accuracy in arm.accuracies),
            "spread": UNKNOWN if arm.spread is None else f"{100 * arm.spread:.2f}",
        }
        for arm in task.arms
    ]


def count_rows(task: TaskComparison) -> list[Row]:
    """One row an arm: rows asked, and those without a plain answer, all seeds together."""
    return [
        {
            "arm": arm.name,
            "rows": str(arm.rows * len(arm.seeds)),
            "unparsed": str(sum(arm.unparsed)),
            "errors": str(sum(arm.errors)),
            "ties": str(sum(arm.ties)),
            "chance %": UNKNOWN if arm.chance is None else percent(arm.chance),
        }
        for arm in task.arms
    ]


def cost_rows(task: TaskComparison) -> list[Row]:
    """One row an arm: how it was made, what that took (means over seeds), how fast it runs."""
    shown = cases(task.arms)
    return [
        {
            "arm": arm.name,
            "method": arm.method or UNKNOWN,
            "bits": _integer(arm.bits),
            "group": _integer(arm.group_size),
            "making": duration(arm.making_seconds),
            "training": duration(arm.training_seconds),
            "calibration": duration(arm.calibration_seconds),
            "before it": duration(arm.source_seconds),
            "GPU-hours": UNKNOWN if arm.gpu_hours is None else f"{arm.gpu_hours:.3f}",
            "samples": _integer(arm.samples_seen),
            "peak GB": UNKNOWN
            if arm.peak_memory_bytes is None
            else f"{arm.peak_memory_bytes / 1e9:.1f}",
            "device": arm.gpu or arm.device or UNKNOWN,
        }
        | _speed_cells(arm, shown)
        for arm in task.arms
    ]


def _speed_cells(arm: ArmResult, shown: Sequence[SpeedCase]) -> Row:
    """Decoding, prefill and memory in the case that is shown; no cells where none is."""
    if not shown:
        return {}
    row = arm.speed.row(shown[0]) if arm.speed else None
    held = memory(row)[0] if row else None
    return {
        "decode tok/s": rate(row.decode_tokens_per_second if row else None),
        "prefill tok/s": rate(row.prefill_tokens_per_second if row else None),
        "memory MB": megabytes(held),
    }


def ablation_rows(comparison: Comparison) -> list[Row]:
    """One row an ablation and task."""
    return [
        {"task": task.definition.task, **_ablation_row(task, ablation)}
        for task in comparison.tasks
        for ablation in task.ablations
    ]


def markdown_table(rows: Sequence[Row], titles: Mapping[str, str] | None = None) -> str:
    """Lay rows out as a Markdown table, first column left, the rest right; "" without rows."""
    if not rows:
        return ""
    head = [(titles or {}).get(key, key) for key in rows[0]]
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *(list(row.values()) for row in rows)]
    return "\n".join(f"| {' | '.join(c.replace('|', chr(92) + '|') for c in x)} |" for x in lines)


def of_task(rows: Sequence[Row], task: str) -> list[Row]:
    """Rows of one task, without its name."""
    mine = [row for row in rows if row["task"] == task]
    return [{key: cell for key, cell in row.items() if key != "task"} for row in mine]


def percent(fraction: float) -> str:
    """Write 0.641 as 64.1."""
    return f"{100 * fraction:.1f}"


def interval(low: float, high: float) -> str:
    """Write (0.601, 0.663) as [60.1, 66.3]."""
    return f"[{percent(low)}, {percent(high)}]"


def points(fraction: float) -> str:
    """Write 0.021 as +2.1; zero has no sign."""
    text = f"{100 * fraction:+.1f}"
    return "0.0" if float(text) == 0 else text


def difference(pair: PairResult) -> str:
    """Write a difference with its interval, as +2.1 [-0.3, +4.5]."""
    return between(pair.difference, pair.low, pair.high)


def between(value: float, low: float | None, high: float | None) -> str:
    """Write a difference with its interval, or alone where that is not known."""
    if low is None or high is None:
        return points(value)
    return f"{points(value)} [{points(low)}, {points(high)}]"


def p_value(p: float) -> str:
    """Three decimals, or <0.001."""
    return "<0.001" if p < 0.001 else f"{p:.3f}"


def duration(seconds: float | None) -> str:
    """Seconds, minutes or hours, whichever reads best."""
    if seconds is None:
        return UNKNOWN
    if seconds < 99.5:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5970 else f"{seconds / 3600:.1f} h"


def price(arm: ArmResult) -> str:
    """What it cost to make, in GPU-hours where it was made on a GPU."""
    hours = arm.gpu_hours
    return duration(arm.cost_seconds) if hours is None else f"{hours:.2g} GPU-hours"


def megabytes(size: int | None) -> str:
    """Write bytes as MB of 10^6 bytes."""
    return UNKNOWN if size is None else f"{size / 1e6:.1f}"


def spread(repeats: Spread | None) -> str:
    """Write repeats with their ends, as 281 [279, 283]."""
    if repeats is None:
        return UNKNOWN
    return f"{figure(repeats.median)} [{figure(repeats.low)}, {figure(repeats.high)}]"


def rate(repeats: Spread | None) -> str:
    """Write the median of repeats."""
    return UNKNOWN if repeats is None else figure(repeats.median)


def figure(value: float) -> str:
    """Three digits, or all before the point."""
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def bits_per_weight(arm: ArmResult) -> str:
    """Bits per weight of the language model's linears."""
    return UNKNOWN if arm.bits_per_weight is None else f"{arm.bits_per_weight:.2f}"


def _arm_row(task: TaskComparison, arm: ArmResult, baseline: str) -> Row:
    pair = task.pair(arm.name)
    return {
        "arm": arm.name,
        "acc %": percent(arm.accuracy),
        "95 % CI": interval(arm.low, arm.high),
        "n": str(arm.n),
        "diff": difference(pair) if pair else "baseline" if arm.name == baseline else UNKNOWN,
        "p": p_value(pair.p_holm) if pair else UNKNOWN,
        "flips": flips(pair.lost, pair.gained) if pair else UNKNOWN,
        "MB": megabytes(arm.checkpoint_bytes),
        "bits/w": bits_per_weight(arm),
        "cost": duration(arm.cost_seconds),
    }


def _pair_row(pair: PairResult) -> Row:
    return {
        "pair": f"{pair.arm} - {pair.reference}",
        "diff": difference(pair),
        "p": p_value(pair.p),
        "p Holm": p_value(pair.p_holm),
        "verdict": pair.verdict,
        "n needed": str(pair.n_needed),
        "flips": flips(pair.lost, pair.gained),
        "by seed": "; ".join(_seed_pairs(pair)) or UNKNOWN,
    }


def _ablation_row(task: TaskComparison, ablation: Ablation) -> Row:
    pair = ablation.pair
    without = f" ({ablation.without})" if ablation.without else ""
    return {
        "part": PARTS[ablation.part] + without,
        "grid": ablation.grid,
        "pair": f"{pair.arm} - {pair.reference}",
        "diff": difference(pair),
        "p": p_value(pair.p),
        "p Holm": p_value(pair.p_holm),
        "by seed": ", ".join(_seed_differences(task, pair)) or UNKNOWN,
        "verdict": _worth(task, ablation),
        "cost": UNKNOWN if ablation.cost is None else f"{ablation.cost:.2f}",
    }


def _worth(task: TaskComparison, ablation: Ablation) -> str:
    if ablation.verdict != "undecided":
        return ablation.verdict
    asked, wanted = task.definition.n, ablation.n_to_decide
    return f"cannot be told apart with n = {asked}; would need about {wanted} questions"


def _seed_differences(task: TaskComparison, pair: PairResult) -> Iterator[str]:
    """Each seed's difference; where the arm has but one seed, the reference's seeds tell apart."""
    alone = len({seed.seed for seed in pair.seed_pairs}) == 1
    for seed in pair.seed_pairs:
        name = seed.reference_seed if alone else seed.seed
        yield f"{name}: {points((seed.gained - seed.lost) / task.definition.n)}"


def _seed_pairs(pair: PairResult) -> Iterator[str]:
    for seed in pair.seed_pairs:
        told = flips(seed.lost, seed.gained)
        yield f"{seed.seed} - {seed.reference_seed}: {told}, p {p_value(seed.p)}"


def flips(lost: float | None, gained: float | None) -> str:
    """Write questions lost and gained, as 11.7/13."""
    return UNKNOWN if lost is None or gained is None else f"{count(lost)}/{count(gained)}"


def count(mean: float) -> str:
    """Write a mean of counts: whole, or to a tenth."""
    return f"{mean:.0f}" if mean == int(mean) else f"{mean:.1f}"


def _integer(value: int | None) -> str:
    return UNKNOWN if value is None else str(value)
