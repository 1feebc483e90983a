"""What changed from arm to arm: counts worked out by hand, KL and intervals against scipy."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from run_folders import TASK, lost_two_gained_three, predictions, write_run
from scipy.special import softmax
from scipy.stats import entropy

from qatbench import stats
from qatbench.records import Prediction
from qatbench.report.changes import UNSCORED, agreement_rows, change_rows, group_rows, section
from qatbench.report.details import Agreement, Changes, GroupChange
from qatbench.report.model import Comparison, TaskComparison
from qatbench.stages import answers
from qatbench.stages.arms import Arm, load_arms
from qatbench.stages.changes import agreement, changes
from qatbench.stages.compare import compare
from qatbench.stages.groups import percentiles
from qatbench.stages.sheets import Sheet, line_up

PAIR = ("arm", "base")


def row(name: str, chosen: str | None, gold: str = "A", **changes: Any) -> Prediction:
    fields = {"choices": ("A", "B", "C"), "status": "ok" if chosen else "unparsed", **changes}
    return Prediction(id=name, task=TASK, gold=gold, chosen=chosen, **fields)


def scored(name: str, scores: Sequence[float], **changes: Any) -> Prediction:
    """A row of option mode: the best option is chosen, the gold is A."""
    options = dict(zip("ABCDE", scores, strict=False))
    return row(name, max(options, key=lambda k: options[k]), scores=options, **changes)


def lined(folder: Path, **runs: Sequence[Prediction] | Sequence[Sequence[Prediction]]) -> Any:
    """Arms and sheet of run folders; an arm is its rows, or rows a seed."""
    folders = []
    for name, rows in runs.items():
        folders.append(folder / name)
        if isinstance(rows[0], Prediction):
            write_run(folder / name, rows)  # type: ignore[arg-type]
            continue
        for seed, mine in enumerate(rows):
            write_run(folder / name / f"seed-{seed}", mine)  # type: ignore[arg-type]
    return of_folders(folders)


def of_folders(folders: Sequence[Path]) -> tuple[list[Arm], Sheet]:
    arms = load_arms(folders)
    (sheet,) = line_up(arms, intersection=False)
    return arms, sheet


def changed(lineup: tuple[list[Arm], Sheet], *pairs: tuple[str, str], **options: Any) -> Any:
    arms, sheet = lineup
    options = {"draws": 200, "seed": 0, **options}
    found = changes(answers.lined(arms, sheet), pairs or (PAIR,), **options)
    return found if len(pairs) > 1 else found[0]


def group(change: Changes, kind: str, name: str) -> GroupChange:
    (found,) = [g for g in change.groups if (g.kind, g.name) == (kind, name)]
    return found


# --- counts -------------------------------------------------------------------------------------


def test_flips_both_ways_are_counted_by_question(tmp_path: Path) -> None:
    base, arm = lost_two_gained_three(tmp_path)
    change = changed(of_folders([base, arm]), ("gptq", "base"), shown=[("gptq", "base")])
    assert (change.both_right, change.both_wrong, change.lost, change.gained) == (4, 1, 2, 3)
    assert (change.rows, change.same_answer, change.wrong_changed) == (10, 0.5, 0)
    assert (change.divergence, change.lost_margin, change.gained_margin) == (None, None, None)
    assert [flip.id for flip in change.flips] == ["0", "1", "6", "7", "8"]  # no scores: by id
    assert change.flips[0].chosen == "B"
    assert change.flips[0].reference_chosen == "A"
    assert change.groups == ()
    assert change.flips_left_out == 0


def test_the_other_way_round_lost_is_gained(tmp_path: Path) -> None:
    base, arm = lost_two_gained_three(tmp_path)
    lineup = of_folders([base, arm])
    there, back = changed(lineup, ("gptq", "base"), ("base", "gptq"))
    assert (there.lost, there.gained) == (back.gained, back.lost) == (2, 3)


def test_answers_that_differ_among_wrong_ones(tmp_path: Path) -> None:
    base = [row("1", "A"), row("2", "B"), row("3", "B"), row("4", None), row("5", None)]
    arm = [row("1", "A"), row("2", "C"), row("3", "B"), row("4", "B"), row("5", None)]
    change = changed(lined(tmp_path, base=base, arm=arm))
    assert change.wrong_changed == 2  # 2: B to C, 4: nothing to B; 5 is nothing both times
    assert change.same_answer == 3 / 5
    assert (change.both_right, change.both_wrong) == (1, 4)


def test_a_pair_named_twice_is_told_once(tmp_path: Path) -> None:
    base, arm = lost_two_gained_three(tmp_path)
    pair = ("gptq", "base")
    assert len(changes(answers.lined(*of_folders([base, arm])), [pair, pair], draws=9, seed=0)) == 1


# --- scores -------------------------------------------------------------------------------------


def test_kl_is_that_of_scipy_with_two_to_five_options(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    sizes = [2, 3, 4, 5] * 10
    pairs = [(5 * rng.normal(size=k), 5 * rng.normal(size=k)) for k in sizes]
    base = [scored(f"{k:02}", p.tolist()) for k, (p, _) in enumerate(pairs)]
    arm = [scored(f"{k:02}", q.tolist()) for k, (_, q) in enumerate(pairs)]
    expected = [entropy(softmax(p), softmax(q)) for p, q in pairs]  # KL(reference || arm)
    found = changed(lined(tmp_path, base=base, arm=arm)).divergence
    told = (found.mean, found.median, found.p95, found.p99, found.largest)
    quantiles = np.quantile(expected, (0.5, 0.95, 0.99))
    wanted = (np.mean(expected), *quantiles, max(expected))
    assert told == pytest.approx(wanted, rel=1e-9)  # both in float64


def test_kl_of_an_arm_from_itself_is_nothing(tmp_path: Path) -> None:
    rows = [scored("1", [-1.0, -2.5, -3.0]), scored("2", [-700.0, -0.1, -0.2])]
    found = changed(lined(tmp_path, base=rows, arm=rows)).divergence
    assert (found.mean, found.largest) == (0, 0)


def test_rows_without_scores_or_with_other_options_have_no_kl(tmp_path: Path) -> None:
    base = [scored("1", [0, -1]), row("2", "A"), scored("3", [0, -1, -2]), scored("4", [0, -1])]
    arm = [scored("1", [0, -3]), scored("2", [0, -9]), scored("3", [0, -9]), row("4", "A")]
    found = changed(lined(tmp_path, base=base, arm=arm)).divergence
    assert found.mean == found.largest == pytest.approx(entropy(softmax([0, -1]), softmax([0, -3])))


def test_a_score_that_overflowed_counts_as_none(tmp_path: Path) -> None:
    rows = [scored("1", [-1, -2]), scored("2", [-5, -2])]
    write_run(tmp_path / "base", rows)
    broken = write_run(tmp_path / "arm", [scored("1", [-1, -2]), scored("2", [-2, -7])])
    file = broken / "predictions.jsonl"
    file.write_text(file.read_text().replace("-7.0", "-Infinity"))
    change = changed(of_folders([tmp_path / "base", broken]))
    assert change.gained == 1
    assert change.gained_margin is None
    assert change.divergence.largest == 0  # of the first row alone


def test_margins_are_of_the_lost_before_and_of_the_gained_after(tmp_path: Path) -> None:
    base = [
        scored("1", [-1, -2, -5]),  # lost, ahead by 1
        scored("2", [-1, -9, -4]),  # lost, by 3
        scored("3", [-1, -9, -9]),  # kept: counts for nothing
        scored("4", [-3, -1, -9]),  # gained
        row("5", "A"),  # lost, no scores
    ]
    arm = [
        scored("1", [-6, -2, -5]),
        scored("2", [-9, -9, -1]),
        scored("3", [-1, -9, -9]),
        scored("4", [-1, -1.5, -9]),  # by 0.5
        row("5", "B"),
    ]
    change = changed(lined(tmp_path, base=base, arm=arm), shown=[PAIR])
    assert (change.lost_margin, change.gained_margin) == (2.0, 0.5)
    widths = [(f.id, f.reference_margin, f.margin) for f in change.flips]
    assert widths == [("2", 3, -8), ("1", 1, -4), ("5", None, None), ("4", -2, 0.5)]


def test_at_most_24_flips_each_way_and_only_of_the_pairs_shown(tmp_path: Path) -> None:
    base = [scored(f"{k:02}", [-1, -2]) for k in range(30)]
    arm = [scored(f"{k:02}", [-3 - k, -2]) for k in range(30)]
    lineup = lined(tmp_path, base=base, arm=arm)
    change, other = changed(lineup, PAIR, ("base", "arm"), shown=[PAIR])
    assert [flip.id for flip in change.flips] == [f"{k:02}" for k in range(29, 5, -1)]
    assert change.flips_left_out == 6
    assert (other.flips, other.flips_left_out) == ((), 0)


# --- rows that form questions -------------------------------------------------------------------


def circular(question: str, *passes: Sequence[float], **meta: Any) -> list[Prediction]:
    return [
        scored(f"{question}.{k}", scores, meta={"group": question, "circular_pass": k, **meta})
        for k, scores in enumerate(passes)
    ]


def test_the_passes_of_a_question_flip_once_and_the_first_to_flip_is_named(tmp_path: Path) -> None:
    good, bad = [-1, -2], [-4, -1]
    base = [
        *circular("q", good, [-1, -9], good, l2_category="perception", has_image=True),
        *circular("r", good, bad, bad),
        *circular("s", bad, bad, good),
    ]
    arm = [
        *circular("q", good, bad, bad, l2_category="perception", has_image=True),
        *circular("r", good, good, good),
        *circular("s", bad, good, bad),
    ]
    lineup = lined(tmp_path, base=base, arm=list(reversed(arm)))
    change = changed(lineup, shown=[PAIR])
    assert (change.both_right, change.both_wrong, change.lost, change.gained) == (0, 1, 1, 1)
    assert (change.rows, change.same_answer) == (9, 3 / 9)
    assert change.wrong_changed == 0  # two options: wrong is wrong
    lost, gained = change.flips
    assert (lost.id, lost.question, lost.reference_margin, lost.margin) == ("q.1", "q", 8, -3)
    assert (gained.id, gained.question, gained.margin) == ("r.1", "r", 1)
    assert lost.groups == {"l2_category": "perception", "context": "image"}
    assert (lost.has_image, gained.has_image, gained.groups) == (True, None, {})
    assert (change.lost_margin, change.gained_margin) == (8, 1)


def test_rows_are_matched_by_id_where_runs_order_them_otherwise(tmp_path: Path) -> None:
    rows = [
        row(name, chosen, meta={"group": "q"})
        for name, chosen in (("x", "A"), ("y", "B"), ("z", "C"))
    ]
    change = changed(lined(tmp_path, base=[*rows, row("1", "A")], arm=[row("1", "A"), *rows[::-1]]))
    assert change.same_answer == 1


# --- seeds --------------------------------------------------------------------------------------


def test_equal_seeds_are_paired_and_counts_are_means(tmp_path: Path) -> None:
    base = [predictions([1, 1, 0, 0]), predictions([1, 0, 0, 0])]
    arm = [predictions([1, 0, 0, 0]), predictions([0, 0, 1, 1])]
    change = changed(lined(tmp_path, base=base, arm=arm), shown=[PAIR])
    assert (change.lost, change.gained) == (1, 1)  # (1, 0) and (1, 2)
    assert (change.both_right, change.both_wrong) == (0.5, 1.5)
    assert change.same_answer == (3 / 4 + 1 / 4) / 2
    assert [flip.id for flip in change.flips] == ["1"]  # of the first pair


def test_a_single_seed_is_paired_with_all(tmp_path: Path) -> None:
    arm = [predictions([1, 0, 0]), predictions([0, 0, 1]), predictions([1, 1, 1])]
    change = changed(lined(tmp_path, base=predictions([1, 0, 0]), arm=arm))
    assert change.lost == pytest.approx(1 / 3)
    assert change.gained == pytest.approx((0 + 1 + 2) / 3)


def test_arms_without_a_common_seed_are_left_out(tmp_path: Path) -> None:
    for name, seeds in (("base", (0, 1)), ("arm", (2, 3))):
        for seed in seeds:
            write_run(tmp_path / name / f"seed-{seed}", predictions([1, seed % 2, 0]))
    rows = answers.lined(*of_folders([tmp_path / "base", tmp_path / "arm"]))
    assert changes(rows, [PAIR], draws=9, seed=0) == ()
    # each with each: (1, 0, 0) and (1, 1, 0) with the same two
    assert agreement(rows).share[0][1] == pytest.approx((1 + 2 / 3 + 2 / 3 + 1) / 4)


def test_agreement_is_a_mean_over_pairs_of_seeds(tmp_path: Path) -> None:
    one = [row("1", "A"), row("2", None), row("3", "B")]
    seeds = [
        [row("1", "A"), row("2", None), row("3", "C")],
        [row("1", "C"), row("2", "A"), row("3", "C")],
    ]
    found = agreement(answers.lined(*lined(tmp_path, one=one, two=seeds)))
    assert found.arms == ("one", "two")
    # one with each seed: rows 1 and 2, none; between the seeds: row 3
    assert found.share == ((1, pytest.approx(1 / 3)), (pytest.approx(1 / 3), pytest.approx(1 / 3)))


# --- groups -------------------------------------------------------------------------------------


def grouped(right: Sequence[int], metas: Sequence[dict[str, Any]]) -> list[Prediction]:
    rows = predictions(right)
    return [r.model_copy(update={"meta": meta}) for r, meta in zip(rows, metas, strict=True)]


def test_groups_are_read_from_the_rows_and_counted_by_hand(tmp_path: Path) -> None:
    metas: list[dict[str, Any]] = [
        {"subject": "NAT", "has_image": True},
        {"subject": "NAT", "has_image": False},
        {"subject": "SOC", "has_image": True},
        {"has_image": True},
    ]
    lineup = lined(tmp_path, base=grouped([1, 1, 0, 0], metas), arm=grouped([0, 1, 1, 1], metas))
    change = changed(lineup)
    names = [(g.kind, g.name, g.n) for g in change.groups]
    assert names == [
        ("subject", "NAT", 2),
        ("subject", "SOC", 1),
        ("context", "image", 3),
        ("context", "text only", 1),
    ]
    natural = group(change, "subject", "NAT")
    assert (natural.accuracy, natural.reference_accuracy, natural.difference) == (0.5, 1, -0.5)
    assert (natural.lost, natural.gained) == (1, 0)
    assert (natural.low, natural.high) == (-1, 0)  # a quarter of the resamples each
    social = group(change, "subject", "SOC")
    assert (social.low, social.high, social.difference) == (None, None, 1)  # one question
    image = group(change, "context", "image")
    assert (image.lost, image.gained, image.difference) == (1, 2, pytest.approx(1 / 3))


def noisy(folder: Path, seeds: int, n: int = 60) -> tuple[list[Arm], Sheet]:
    rng = np.random.default_rng(1)
    metas = [{"subject": "all", "category": f"c{k % 3}"} for k in range(n)]
    base = [grouped((rng.random(n) < 0.7).astype(int).tolist(), metas) for _ in range(seeds)]
    arm = [grouped((rng.random(n) < 0.5).astype(int).tolist(), metas) for _ in range(seeds)]
    return lined(folder, base=base, arm=arm)  # type: ignore[no-any-return]


@pytest.mark.parametrize("seeds", [1, 2, 3])
def test_intervals_are_what_the_bootstrap_of_pairs_comes_to(tmp_path: Path, seeds: int) -> None:
    arms, sheet = noisy(tmp_path, seeds)
    change = changed((arms, sheet))
    for one in change.groups:
        places = [
            k
            for k, key in enumerate(sheet.keys)
            if arms[0].runs[0].units[TASK][key][0].meta[one.kind] == one.name
        ]
        a, b = (sheet.scores[name].right[:, places].mean(axis=0) for name in PAIR)
        drawn = stats.paired_bootstrap(a, b, draws=200_000, seed=3)
        assert one.difference == pytest.approx(drawn.difference)
        atom = 1 / seeds**2 / len(places)  # means lie on a lattice: one step of it for the draws
        assert one.low == pytest.approx(drawn.low, abs=atom + 1e-9)
        assert one.high == pytest.approx(drawn.high, abs=atom + 1e-9)


@pytest.mark.parametrize("differences", [[1, 0, 0, -1], [3, 1, 0, -2], [2, 2, 0, 0, 4], [5, 5]])
@pytest.mark.parametrize("level", [0.5, 0.8, 0.95])
def test_percentiles_are_those_of_all_resamples(differences: list[int], level: float) -> None:
    n, tail = len(differences), (1 - level) / 2
    means = np.array([sum(some) for some in itertools.product(differences, repeat=n)]) / n / 6
    low = min(m for m in means if np.mean(means <= m) >= tail - 1e-12)
    high = max(m for m in means if np.mean(means >= m) >= tail - 1e-12)
    sizes, counts = np.unique(differences, return_counts=True)
    assert percentiles(sizes, counts, 6, level) == pytest.approx((low, high))
    mirrored = percentiles(-sizes[::-1], counts[::-1], 6, level)
    assert mirrored == pytest.approx((-high, -low))


def test_clusters_are_drawn_together(tmp_path: Path) -> None:
    arms, sheet = noisy(tmp_path, 1)
    clusters = [int(key) // 4 for key in sheet.keys]
    change = changed((arms, sheet), clusters=clusters, draws=500, seed=7)
    a, b = (sheet.scores[name].right.mean(axis=0) for name in PAIR)
    drawn = stats.paired_bootstrap(a, b, clusters, draws=500, seed=7)
    one = group(change, "subject", "all")
    assert (one.low, one.high) == (pytest.approx(drawn.low), pytest.approx(drawn.high))
    alone = changed((arms, sheet), clusters=list(sheet.keys))
    assert alone == changed((arms, sheet))  # each its own cluster
    together = changed((arms, sheet), clusters=[0] * len(sheet.keys))
    assert group(together, "subject", "all").low is None


# --- report -------------------------------------------------------------------------------------

METAS = [
    {"subject": "NAT" if k % 2 else "SOC", "category": f"cat {k // 25:02}", "has_image": k < 150}
    for k in range(300)
]
QUANTIZED = {"bits": 4, "group_size": 128}


def told(folder: Path, metas: Sequence[dict[str, Any]] = METAS, **options: Any) -> Comparison:
    """Base, a PTQ and a QAT arm over 300 questions; the QAT arm wins 30 and loses 10."""
    right = {
        "base": [1] * 280 + [0] * 20,
        "gptq": [1] * 240 + [0] * 60,
        "qat": [0] * 10 + [1] * 260 + [0] * 30,
    }
    folders = []
    for name, mine in right.items():
        scores = [[-1.0, -1.4] if good else [-1.5, -1.0] for good in mine]
        rows = [scored(f"{k:03}", s, meta=metas[k]) for k, s in enumerate(scores)]
        rows = [r.model_copy(update=options) for r in rows]
        facts = {"method": name, **({} if name == "base" else QUANTIZED)}
        folders.append(write_run(folder / name, rows, **facts))
    return with_changes(compare(folders, folders[0], draws=50), folders)


def with_changes(comparison: Comparison, folders: Sequence[Path]) -> Comparison:
    rows = answers.lined(*of_folders(folders))
    (task,) = comparison.tasks
    contests = [(pair.arm, pair.reference) for pair in task.contests]
    pairs = [(pair.arm, pair.reference) for pair in task.pairs] + contests
    update = {
        "changes": changes(rows, pairs, shown=contests, draws=50, seed=0),
        "agreement": agreement(rows),
    }
    return comparison.model_copy(update={"tasks": (task.model_copy(update=update),)})


def test_rows_of_the_table_and_of_the_csv(tmp_path: Path) -> None:
    comparison = told(tmp_path)
    rows = change_rows(comparison)
    assert [r["pair"] for r in rows] == ["gptq - base", "qat - base", "qat - gptq"]
    kl = entropy(softmax([-1.0, -1.4]), softmax([-1.5, -1.0]))
    back = entropy(softmax([-1.5, -1.0]), softmax([-1.0, -1.4]))
    assert rows[2] == {
        "task": TASK,
        "pair": "qat - gptq",
        "both right": "230",
        "lost": "10",
        "gained": "30",
        "both wrong": "30",
        "otherwise": "0",
        "same %": "86.7",
        "KL mean": f"{(10 * kl + 30 * back) / 300:.3f}",
        "KL p99": "0.10",
        "lost margin": "0.40",
        "gained margin": "0.40",
    }
    assert rows[0]["gained"] == "0"
    assert rows[0]["gained margin"] == "-"
    groups = group_rows(comparison)
    assert len(groups) == 3 * (2 + 12 + 2)
    assert {r["kind"] for r in groups} == {"subject", "category", "context"}
    text = next(r for r in groups if r["pair"] == "qat - gptq" and r["group"] == "text only")
    assert (text["n"], text["arm %"], text["reference %"]) == ("150", "80.0", "60.0")
    assert text["diff"].startswith("+20.0 [+1")
    assert text["flips"] == "0/30"
    assert agreement_rows(comparison.tasks[0])[0] == {
        "same answer %": "base",
        "base": "100.0",
        "gptq": "86.7",
        "qat": "93.3",
    }


def test_the_section_says_it_in_words_and_shows_groups_of_contests_only(tmp_path: Path) -> None:
    comparison = told(tmp_path)
    text = section(comparison, comparison.tasks[0])
    first, second = [line for line in text.splitlines() if line.startswith("- ")]
    assert first == (
        "- `qat` against `gptq`: of 300 questions 10 went wrong and 30 came right; of the 30 wrong"
        " both times 0 % are answered differently. 86.7 % of questions have the same answer. KL"
        " 0.013 nats on average, 99 % of rows below 0.10. What was lost was near: median margin"
        " 0.40 nats, the gold option 1.5 times as likely as the next; what was gained leads by"
        " 0.40 nats."
    )
    assert second.startswith(
        "- `qat` (the best of 2 arms with 4 bits g128) against the baseline `base`: of 300"
    )
    assert text.count(" by group") == 1
    assert "`qat` against `gptq` by group; of 12 categories the 8 with the widest" in text
    shown = [line[2:8] for line in text.splitlines() if "| category |" in line]
    # +80 points, -40 and +40, then those without a difference
    assert shown == [f"cat {k}" for k in ("10", "00", "09", "01", "02", "03", "04", "05")]
    assert "| same answer % | base | gptq | qat |" in text


def test_a_contest_against_the_baseline_is_told_once(tmp_path: Path) -> None:
    told(tmp_path)
    folders = [tmp_path / name for name in ("base", "gptq", "qat")]
    comparison = with_changes(compare(folders, folders[1], draws=50), folders)
    text = section(comparison, comparison.tasks[0])
    (line,) = [line for line in text.splitlines() if line.startswith("- ")]
    assert line.startswith("- `qat` against `gptq`: of 300")
    assert [r["pair"] for r in change_rows(comparison)] == ["base - gptq", "qat - gptq"]


def test_without_scores_nothing_is_said_of_distributions(tmp_path: Path) -> None:
    comparison = told(tmp_path, scores=None)
    text = section(comparison, comparison.tasks[0])
    assert "nats" not in text
    assert "| 86.7 | - | - | - | - |" in text
    assert f"\n- {UNSCORED}\n" in text
    scored = told(tmp_path / "scored")
    assert UNSCORED not in section(scored, scored.tasks[0])


def test_a_kind_of_one_group_and_small_categories_are_not_shown(tmp_path: Path) -> None:
    metas = [{"subject": "one", "category": f"{k // 10}"} for k in range(300)]
    comparison = told(tmp_path, metas)
    assert " by group" not in section(comparison, comparison.tasks[0])
    assert len(group_rows(comparison)) == 3 * 31


def test_rows_of_one_question_are_told_as_rows(tmp_path: Path) -> None:
    metas = [{"group": f"{k // 2:03}", "circular_pass": k % 2} for k in range(300)]
    comparison = told(tmp_path, metas)
    text = section(comparison, comparison.tasks[0])
    assert "of 150 questions 5 went wrong and 15 came right; 0 rows wrong both times are" in text
    assert "86.7 % of rows have the same answer" in text


def test_means_over_seeds_are_called_so(tmp_path: Path) -> None:
    base = write_run(tmp_path / "base", predictions([1, 1, 1, 0, 0] * 40), method="base")
    for seed, mine in enumerate(([1, 1, 0, 0, 0], [1, 1, 1, 1, 0])):
        write_run(tmp_path / "qat" / f"seed-{seed}", predictions(mine * 40), method="qat")
    folders = [base, tmp_path / "qat"]
    comparison = with_changes(compare(folders, base, draws=50), folders)
    text = section(comparison, comparison.tasks[0])
    assert "`qat` against the baseline `base`: of 200 questions 20 went wrong and 20" in text
    assert "came right (means over seeds)" in text
    assert "on the diagonal between the seeds of one arm" in text
    assert "| qat | 80.0 | 60.0 |" in text


def test_the_matrix_has_at_most_twelve_arms_and_no_changes_say_nothing(tmp_path: Path) -> None:
    (task,) = told(tmp_path).tasks
    names = tuple(f"a{k}" for k in range(13))
    many = Agreement(arms=names, share=((1.0,) * 13,) * 13)
    full = Comparison(baseline="base", tasks=(task.model_copy(update={"agreement": many}),))
    assert "same answer % | a0" not in section(full, full.tasks[0])
    assert len(agreement_rows(full.tasks[0])) == 13
    empty: TaskComparison = task.model_copy(update={"changes": (), "agreement": None})
    bare = Comparison(baseline="base", tasks=(empty,))
    assert section(bare, empty) == ""
    assert change_rows(bare) == group_rows(bare) == []


@pytest.mark.parametrize(
    ("margin", "words"),
    [
        (0.69, "was near: median margin 0.69 nats, the gold option 2 times"),
        (1.0, "What was lost: median margin 1.0 nats, the gold option 2.7 times"),
        (4.0, "had been clear: median margin 4.0 nats, the gold option 55 times"),
        (9.0, "had been clear: median margin 9.0 nats, the gold option over 100 times"),
    ],
)
def test_near_and_clear_margins(tmp_path: Path, margin: float, words: str) -> None:
    comparison = told(tmp_path)
    (task,) = comparison.tasks
    wide = tuple(c.model_copy(update={"lost_margin": margin}) for c in task.changes)
    assert words in section(comparison, task.model_copy(update={"changes": wide}))


def test_what_is_written_can_be_read_back(tmp_path: Path) -> None:
    comparison = told(tmp_path)
    assert Comparison.model_validate_json(comparison.model_dump_json()) == comparison
