"""metrics.json: what counts as a question, alone and against `compare` and the originals."""

from __future__ import annotations

import base64
import csv
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import tiny

from qatbench import store
from qatbench.records import Accuracy, Prediction, TaskMetrics
from qatbench.report.warnings import WarningCode
from qatbench.stages.common import silent
from qatbench.stages.compare import compare
from qatbench.stages.evaluate import EvalSettings, evaluate
from qatbench.stages.metrics import summarize, units
from qatbench.tasks import mmbench, protocols, selector
from qatbench.vlm.load import ModelFolder

SHORT = {
    "Overall": "overall",
    "CP": "coarse_perception",
    "FP-S": "finegrained_perception (instance-level)",
    "FP-C": "finegrained_perception (cross-instance)",
    "AR": "attribute_reasoning",
    "RR": "relation_reasoning",
    "LR": "logic_reasoning",
}


def row(name: str, right: bool, choices: str = "AB", **meta: Any) -> Prediction:
    status = meta.pop("status", "ok")
    chosen = "A" if right else "B"
    return Prediction(
        id=name,
        task="mmbench",
        choices=tuple(choices),
        gold="A",
        chosen=chosen if status == "ok" else None,
        status=status,
        meta=meta,
    )


def passes(group: str, *right: bool, **meta: Any) -> list[Prediction]:
    return [
        row(f"{turn}00{group}", good, "ABC", group=group, circular_pass=turn, **meta)
        for turn, good in enumerate(right)
    ]


def task_of(rows: Sequence[Prediction], protocol: str = "qatbench") -> TaskMetrics:
    name = rows[0].task
    (task,) = summarize(rows, protocols={name: protocol}, mode="options", seconds=2.0).tasks
    return task


def counts(some: Mapping[str, Accuracy]) -> dict[str, tuple[int, int]]:
    return {name: (one.right, one.n) for name, one in some.items()}


def test_a_circular_question_is_right_when_all_its_rows_are() -> None:
    rows = passes("1", True, True, True, category="ocr", l2_category="coarse", has_image=True)
    rows += passes("2", True, True, False, category="ocr", l2_category="coarse", has_image=True)
    rows += passes("3", True, True, category="emotion", l2_category="coarse", has_image=False)
    rows.append(row("1", True))  # its id is the name of a group: a question of its own
    rows = [rows[k] for k in (3, 8, 1, 7, 5, 0, 6, 2, 4)]

    task = task_of(rows)

    assert (task.overall.n, task.overall.right, task.overall.accuracy) == (4, 3, 0.75)
    assert task.overall.low < 0.75 < task.overall.high
    assert task.overall.chance == pytest.approx((2 / 27 + 1 / 9 + 1 / 2) / 4)
    assert counts(task.groups["category"]) == {"emotion": (1, 1), "ocr": (1, 2)}
    assert counts(task.groups["l2_category"]) == {"coarse": (2, 3)}
    assert counts(task.groups["modality"]) == {"image": (1, 2), "text": (2, 2)}


def test_what_was_not_answered_is_counted_by_row() -> None:
    rows = passes("1", True, True) + passes("2", True, True, status="unparsed")
    rows.append(row("9", True, status="error").model_copy(update={"tie": True}))
    task = task_of(rows)
    assert (task.overall.n, task.overall.right) == (3, 1)
    assert (task.unparsed, task.errors, task.ties) == (2, 1, 1)


def test_a_group_without_its_first_pass_is_left_out() -> None:
    rows = passes("1", True, True)[1:] + passes("2", True, False)[:1]
    assert [[r.id for r in unit] for unit in units(rows)] == [["0002"]]
    assert (task_of(rows).overall.n, task_of(rows).overall.right) == (1, 1)


def test_the_category_is_that_of_the_first_pass() -> None:
    first, second = passes("1", True, True, category="ocr")
    other = second.model_copy(update={"meta": second.meta | {"category": "late"}})
    assert counts(task_of([other, first]).groups["category"]) == {"ocr": (1, 1)}


def test_rows_that_are_no_passes_count_alone_with_their_subject() -> None:
    rows = [row(str(n), n < 2, subject="social", category="Maps") for n in range(3)]
    task = task_of(rows)
    assert counts(task.groups["subject"]) == {"social": (2, 3)}
    assert set(task.groups) == {"modality", "subject"}
    assert task.overall.chance == 0.5


def test_the_groups_of_scienceqa_s_own_table() -> None:
    def asked(name: str, right: bool, **meta: Any) -> Prediction:
        return row(name, right, **meta).model_copy(update={"task": "scienceqa"})

    rows = [
        asked("1", True, subject="natural science", grade="grade6", has_hint=True, has_image=True),
        asked(
            "2", False, subject="social science", grade="grade7", has_hint=False, has_image=False
        ),
        asked("3", True, has_hint=False, has_image=True),
        asked("4", True, subject="language science", has_image=False),  # a hint is not known of
    ]
    official = task_of(rows).groups["official"]
    assert counts(official) == {
        "NAT": (1, 1), "SOC": (0, 1), "LAN": (1, 1), "TXT": (1, 1), "IMG": (2, 2), "NO": (0, 1),
        "G1-6": (1, 1), "G7-12": (0, 1),
    }  # fmt: skip
    assert "official" not in task_of([row("1", True, subject="natural science")]).groups


@pytest.mark.parametrize("key", ["group", "pass_of"])
def test_circular_data_are_counted_in_every_way(key: str) -> None:
    rows = passes("1", True, False, True) + passes("2", True, True) + passes("3", False, True)[1:]
    metas = [{key: one.meta["group"], "circular_pass": one.meta["circular_pass"]} for one in rows]
    rows = [r.model_copy(update={"meta": meta}) for r, meta in zip(rows, metas, strict=True)]
    task = task_of(rows)
    assert counts(task.groups["counted_as"]) == {
        "circular": (1, 2), "vanilla_pass_0": (2, 2), "all_rows": (5, 6),
    }  # fmt: skip
    assert task.overall == task.groups["counted_as"]["circular" if key == "group" else "all_rows"]


# --- a whole evaluation -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four circular questions: two of three options, two of two; the later passes share images."""
    folder = tmp_path_factory.mktemp("mmbench")
    columns = ["index", "question", *"ABC", "answer", "category", "l2-category", "image", "split"]
    with (folder / "mmbench_dev.tsv").open("w", newline="") as stream:
        writer = csv.DictWriter(stream, columns, delimiter="\t")
        writer.writeheader()
        for number in range(4):
            options = list(tiny.COLOURS)[: 3 - number // 2]
            picture = tiny.save_image(folder, "dev", str(number), options[0], number)
            image = base64.b64encode(picture.read_bytes()).decode()
            for turn in range(len(options)):
                shown = options[-turn:] + options[:-turn] if turn else options
                cells = {"index": turn * 1_000_000 + number, "image": number if turn else image}
                cells |= {"question": f"What color is square {number}?", "split": "dev"}
                cells |= dict(zip("ABC", shown, strict=False))
                cells |= {"answer": "ABC"[shown.index(options[0])], "category": f"c{number % 2}"}
                writer.writerow(cells | {"l2-category": "coarse_perception"})
    return folder


def run(model: ModelFolder, protocol: str, mode: Any, table: Path, out: Path) -> list[Prediction]:
    settings = EvalSettings(
        selectors=(selector.parse("mmbench"),),
        protocol={"mmbench": protocol},
        mode=mode,
        device="cpu",
    )
    data = {"mmbench": str(table)}
    evaluate(model, settings, data, out, resume=False, progress=silent)
    return store.read_predictions(out / "predictions.jsonl")


@pytest.mark.parametrize(
    ("protocol", "mode", "n"),
    [
        ("qatbench", "options", 4),
        ("vlmevalkit-exact@2024-03", "options", 4),
        ("grace-mmbench", "options", 10),
        ("grace-mmbench", "generate", 10),
    ],
)
def test_metrics_and_compare_count_the_same_questions(
    models: dict[str, ModelFolder], table: Path, tmp_path: Path, protocol: str, mode: str, n: int
) -> None:
    rows = run(models["llava"], protocol, mode, table, tmp_path / "run")

    (stated,) = store.read_json(tmp_path / "run" / "metrics.json")["tasks"]
    assert len(rows) == 10
    assert stated["overall"]["n"] == n
    assert sum(one["n"] for one in stated["groups"]["category"].values()) == n
    assert stated["groups"]["l2_category"]["coarse_perception"] == stated["overall"]
    assert stated["groups"]["modality"]["image"]["n"] == n
    (task,) = compare([], tmp_path / "run").tasks
    (arm,) = task.arms
    assert (arm.n, arm.rows, arm.right) == (n, 10, (stated["overall"]["right"],))
    assert arm.chance == pytest.approx(stated["overall"]["chance"])
    assert WarningCode.METRICS_DISAGREE not in {warning.code for warning in task.warnings}


def test_rows_tell_their_question_and_pass_but_no_text(
    models: dict[str, ModelFolder], table: Path, tmp_path: Path
) -> None:
    together = run(models["llava"], "qatbench", "options", table, tmp_path / "one")
    apart = run(models["llava"], "grace-mmbench", "generate", table, tmp_path / "two")
    for joined, alone in zip(together, apart, strict=True):
        meta = {"has_image": True, "category": f"c{int(joined.id) % 2}"}
        meta |= {"l2_category": "coarse_perception", "circular_pass": int(joined.id) // 1_000_000}
        meta |= {"image": joined.meta["image"]}  # a digest
        assert len(joined.meta["image"]) == 12
        number = str(int(joined.id) % 1_000_000)
        assert joined.meta == meta | {"group": number}
        assert alone.meta == meta | {"pass_of": number}
        assert alone.raw is None
    for out in ("one", "two"):
        assert "square" not in (tmp_path / out / "predictions.jsonl").read_text()
    scores = {(r.meta["group"], r.gold): (r.scores or {})[str(r.gold)] for r in together}
    assert len({round(score, 4) for (group, _), score in scores.items() if group == "0"}) == 1


# --- against the original evaluators ------------------------------------------------------------


def answered(case: dict[str, Any], split: str | None) -> list[Prediction]:
    protocol = protocols.get(case["protocol"])
    raws = [raw for raw in case["rows"] if split in (None, raw.get("split"))]
    rows = []
    for question, raw in zip(map(mmbench.from_row, raws), raws, strict=True):
        chosen = protocol.extract(str(raw["prediction"] or ""), question.options)
        made = row(question.id, True, "".join(question.options), circular_pass=0)
        meta = {"category": question.category, "l2_category": question.l2_category}
        meta |= {"circular_pass": question.circular_pass}
        meta |= {"group": question.group} if protocol.circular else {}
        rows.append(made.model_copy(update={"gold": question.gold, "chosen": chosen, "meta": meta}))
    return rows


def figures_of(rows: Sequence[Prediction], protocol: str) -> dict[str, float]:
    """Overall and group accuracies in one, as VLMEvalKit's report has them."""
    task = task_of(rows, protocol)
    both = task.groups["category"] | task.groups["l2_category"]
    return {"overall": task.overall.accuracy} | {name: one.accuracy for name, one in both.items()}


def theirs(expected: dict[str, Any]) -> dict[str, float]:
    flat = expected
    if "category" in expected:
        flat = {"overall": expected["overall"]} | expected["category"] | expected["l2_category"]
    return {SHORT.get(name, name): share for name, share in flat.items()}


@pytest.mark.parity
def test_circular_figures_agree_with_the_originals(shared_dir: Path) -> None:
    wrong: list[tuple[Any, ...]] = []
    checked: Counter[str] = Counter()
    with (shared_dir / "fixtures/scoring/circular.jsonl").open(encoding="utf-8") as handle:
        cases = [json.loads(text) for text in handle]
    for case in cases:
        name, expected = case["protocol"], case["expected"]
        key = {True: lambda r: r.meta["group"], False: lambda r: r.id}[protocols.get(name).circular]
        hits = {key(u[0]): int(all(r.right for r in u)) for u in units(answered(case, None))}
        told = expected["per_question"]
        drawn = [question for question, hit in told.items() if hit is None]  # at random
        if hits | dict.fromkeys(drawn) != told:
            wrong.append((case["id"], hits, told))
        for split, figures in (expected.get("by_split") or {None: expected}).items():
            mine = figures_of(answered(case, split), name)
            if not drawn and mine != pytest.approx(theirs(figures)):
                wrong.append((case["id"], split, mine, theirs(figures)))
            checked[name] += not drawn
    assert wrong == []
    assert len(checked) == 7
    assert checked.total() == 112  # 116 cases: one has two splits, five draw at random
