"""A whole recipe: what is missing is made, a kill changes nothing, stale results are refused."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import tiny

from qatbench.errors import ArtifactError, UsageError
from qatbench.recipe_file import load_recipe
from qatbench.stages.grid_check import check_grid
from qatbench.stages.plan import Plan
from qatbench.stages.run import run
from qatbench.stages.tune import tune
from qatbench.stages.workers import Job, WorkerError, run_jobs

RECIPE = """
name: tiny
student: {model}
teacher: {{arm: sft}}
data:
  train: scienceqa:train:text
  calibration: scienceqa:train:text
  eval: [scienceqa:test:text]
  paths: {{scienceqa: {data}}}
grid: {{bits: 4, group_size: 32}}
training: {{steps: 6, batch_size: 4, micro_batch_size: 4, lr: 1.0e-3, scale_lr: 1.0e-2, seeds: [0]}}
arms:
  base: {{kind: base}}
  sft: {{kind: sft}}
  sft-rtn: {{kind: rtn, of: sft}}
  grace: {{kind: grace}}
tuning:
  data: scienceqa:train:text
  folds: 2
  candidates: {{sft: [{{lr: 1.0e-3}}, {{lr: 2.0e-3}}], grace: [{{lr: 1.0e-3, beta_target: 1.0}}]}}
"""
ARMS = ("base", "sft/seed-0", "sft-rtn/seed-0", "grace/seed-0")


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("run")
    model = tiny.save_text_model(root / "model")
    data = tiny.save_questions(root / "data", text=40, images=0)
    file = root / "recipe.yaml"
    file.write_text(RECIPE.format(model=model, data=data), encoding="utf-8")
    return file


def quiet(what: str, done: int, total: int) -> None:
    return None


def do(recipe: Path, out: Path, *arms: str) -> object:
    plan = Plan(load_recipe(recipe, check_grid), out, paths={}, device="cpu")
    return run(plan, arms, progress=quiet)


@pytest.fixture(scope="module")
def whole(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("whole")
    assert do(recipe, out) is not None
    return out / "tiny"


def predictions(root: Path) -> dict[str, str]:
    return {arm: (root / arm / "predictions.jsonl").read_text() for arm in ARMS}


def test_a_recipe_leaves_predictions_a_report_and_the_lock(whole: Path) -> None:
    rows = [json.loads(line) for line in predictions(whole)["grace/seed-0"].splitlines()]
    assert len(rows) == 40
    assert all(row["status"] == "ok" and row["chosen"] in row["scores"] for row in rows)
    report = (whole / "report.md").read_text()
    for arm in ("base", "sft", "sft-rtn", "grace"):
        assert f"| {arm} |" in report
    comparison = json.loads((whole / "comparison.json").read_text())
    assert comparison["baseline"] == "base"
    lock = (whole / "recipe.lock.yaml").read_text()
    assert "weight_decay: 0.0" in lock  # a default that the recipe does not say
    assert (whole / "grace" / "seed-0" / "train.jsonl").exists()
    made = json.loads((whole / "grace" / "seed-0" / "checkpoint.json").read_text())
    assert made["figures"]["reload"]["text"] <= made["figures"]["reload"]["bound"]
    assert not list(whole.rglob("unfinished.json"))


def test_what_is_finished_is_not_done_again_even_without_checkpoints(
    recipe: Path, whole: Path, tmp_path: Path
) -> None:
    copy = tmp_path / "tiny"
    shutil.copytree(whole, copy, ignore=shutil.ignore_patterns("checkpoints"))
    times = {file: file.stat().st_mtime_ns for file in copy.rglob("predictions.jsonl")}
    assert do(recipe, tmp_path) is not None
    assert {file: file.stat().st_mtime_ns for file in copy.rglob("predictions.jsonl")} == times
    assert not (copy / "checkpoints").exists()


def test_an_arm_may_start_from_integers_and_teach_itself(recipe: Path, tmp_path: Path) -> None:
    text = recipe.read_text().partition("tuning:")[0]
    text += "  rtn: {kind: rtn}\n  again: {kind: qat, init: rtn}\n"
    text += "  self: {kind: grace, teacher: self}\n"
    (tmp_path / "recipe.yaml").write_text(text)
    assert do(tmp_path / "recipe.yaml", tmp_path, "again", "self") is None
    made = {
        name: json.loads((tmp_path / "tiny" / name / "seed-0" / "checkpoint.json").read_text())
        for name in ("again", "self")
    }
    rtn = json.loads((tmp_path / "tiny" / "checkpoints" / "rtn" / "provenance.json").read_text())
    assert made["again"]["spec"]["init"] == rtn["fingerprint"]
    assert made["self"]["spec"]["teacher"] == made["self"]["spec"]["student"]
    told = made["self"]["figures"]["leakage"]
    assert told[0].startswith("Leakage check of 40 evaluation questions against 40 training")


def test_autoround_tunes_what_another_arm_trained(recipe: Path, tmp_path: Path) -> None:
    text = recipe.read_text().partition("tuning:")[0] + "  auto: {kind: autoround, of: sft}\n"
    few = "calibration: {samples: 6, batch_size: 3, iters: 2}\narms:"
    (tmp_path / "recipe.yaml").write_text(text.replace("arms:", few))
    assert do(tmp_path / "recipe.yaml", tmp_path, "auto") is None
    made = json.loads((tmp_path / "tiny" / "auto" / "seed-0" / "checkpoint.json").read_text())
    sft = tmp_path / "tiny" / "checkpoints" / "sft" / "seed-0" / "provenance.json"
    assert made["spec"]["model"] == json.loads(sft.read_text())["fingerprint"]
    assert [made["spec"][key] for key in ("samples", "batch_size", "iters")] == [6, 3, 2]
    assert made["figures"]["method"] == "autoround"


def test_one_arm_brings_what_it_needs_and_no_comparison(recipe: Path, tmp_path: Path) -> None:
    assert do(recipe, tmp_path, "sft-rtn") is None
    assert (tmp_path / "tiny" / "sft-rtn" / "seed-0" / "metrics.json").exists()
    assert (tmp_path / "tiny" / "checkpoints" / "sft" / "seed-0" / "config.json").exists()
    assert not (tmp_path / "tiny" / "sft").exists()  # needed, not wanted: not evaluated
    assert not (tmp_path / "tiny" / "report.md").exists()


def test_results_of_other_settings_are_refused_by_name(
    recipe: Path, whole: Path, tmp_path: Path
) -> None:
    shutil.copytree(whole, tmp_path / "tiny")
    other = tmp_path / "other.yaml"
    other.write_text(recipe.read_text().replace("steps: 6", "steps: 7"), encoding="utf-8")
    with pytest.raises(ArtifactError, match="made with other settings: model"):
        do(other, tmp_path)


def test_an_unknown_arm_is_refused(recipe: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no arm 'gptqq'"):
        do(recipe, tmp_path, "gptqq")


# --- kills ----------------------------------------------------------------------------------------


def kill_when(recipe: Path, out: Path, arm: str, seen: Callable[[Path], bool]) -> None:
    """Start `run`, and kill -9 it as soon as `seen` holds for the recipe's results."""
    command = [sys.executable, "-m", "qatbench", "run", str(recipe), "--arm", arm]
    command += ["--out", str(out), "--device", "cpu", "--save-every", "2"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    until = time.monotonic() + 120
    while not seen(out / "tiny"):
        assert process.poll() is None, "it ended before it could be killed"
        assert time.monotonic() < until
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arm", "file"),
    [
        ("grace", "checkpoints/grace/seed-0/state/step-0000002/state.json"),  # in training
        ("sft-rtn", "checkpoints/sft-rtn/seed-0/unfinished.json"),  # in quantization
        ("sft", "sft/seed-0/predictions.partial.jsonl"),  # in evaluation
    ],
)
def test_killed_anywhere_it_goes_on_to_the_same_predictions(
    arm: str, file: str, recipe: Path, whole: Path, tmp_path: Path
) -> None:
    kill_when(recipe, tmp_path, arm, lambda root: (root / file).exists())
    assert not (tmp_path / "tiny" / arm / "seed-0" / "metrics.json").exists()
    assert do(recipe, tmp_path) is not None
    assert predictions(tmp_path / "tiny") == predictions(whole)


# --- tuning and workers ---------------------------------------------------------------------------


def test_tuning_asks_every_training_question_once_and_picks_the_best(
    recipe: Path, tmp_path: Path
) -> None:
    checked = load_recipe(recipe, check_grid)

    def go() -> dict[str, object]:
        return tune(checked, tmp_path, {}, arms=None, folds=None, device="cpu", progress=quiet)

    summary = go()
    for row in summary["candidates"]:  # type: ignore[attr-defined]
        assert row["n"] == 40
        assert sum(fold["right"] for fold in row["folds"]) / 40 == row["accuracy"]
    scored = [r for r in summary["candidates"] if r["arm"] == "sft"]  # type: ignore[attr-defined]
    top = max(scored, key=lambda r: (r["accuracy"], -r["loss"]))
    assert summary["best"]["sft"] == json.loads(top["candidate"])  # type: ignore[index]
    files = {f: f.stat().st_mtime_ns for f in tmp_path.rglob("result.json")}
    assert len(files) == 6
    go()
    assert {f: f.stat().st_mtime_ns for f in tmp_path.rglob("result.json")} == files


def test_a_fold_is_neither_trained_on_nor_shown_to_the_teacher(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from qatbench.stages import tune as module

    trained: list[set[str]] = []
    asked: list[set[str]] = []
    run_class, answer = module.TrainingRun, module.answer_all

    class Spy(run_class):  # type: ignore[misc, valid-type]
        def __init__(self, request, *rest):  # type: ignore[no-untyped-def]
            trained.append({q.id for q in request.questions})
            assert request.settings.weight_decay == 0.0
            super().__init__(request, *rest)

    def spy(loaded, questions, *rest):  # type: ignore[no-untyped-def]
        asked.append({q.id for part in questions.values() for q in part})
        return answer(loaded, questions, *rest)

    teachers: list[set[str]] = []
    real = module.train

    def taught(request, *rest, **more):  # type: ignore[no-untyped-def]
        teachers.append({q.id for q in request.questions})
        return real(request, *rest, **more)

    monkeypatch.setattr(module, "TrainingRun", Spy)
    monkeypatch.setattr(module, "answer_all", spy)
    monkeypatch.setattr(module, "train", taught)
    checked = load_recipe(recipe, check_grid)
    for name, arm in checked.arms.items():  # what an earlier search chose is not searched from
        checked.arms[name] = arm.model_copy(update={"training": {"weight_decay": 0.5}})
    tune(
        checked, tmp_path, {},
        arms=None, folds=None, device="cpu", progress=quiet,
    )  # fmt: skip
    assert len(trained) == len(asked) == 6
    for seen, held in zip(trained, asked, strict=True):
        assert not seen & held
        assert len(seen | held) == 40
    held_by_fold = [asked[-2], asked[-1]]  # grace: fold 0, fold 1
    assert len(teachers) == 2
    assert all(not t & h for t, h in zip(teachers, held_by_fold, strict=True))


def test_workers_keep_the_order_and_pass_on_the_first_failure(tmp_path: Path) -> None:
    said: list[int] = []
    jobs = [
        Job("second", ("--version",), frozenset({"first"})),
        Job("first", ("--version",)),
        Job("bad", ("eval", str(tmp_path / "none"), "--task", "scienceqa", "--out", "x"),
            frozenset({"second"})),
        Job("never", ("--version",), frozenset({"bad"})),
    ]  # fmt: skip
    with pytest.raises(WorkerError, match="bad failed: no model at") as caught:
        run_jobs(jobs, 2, tmp_path / "logs", lambda what, done, total: said.append(done))
    assert caught.value.exit_code == 3
    assert (tmp_path / "logs" / "second.log").read_text().strip()
    assert not (tmp_path / "logs" / "never.log").exists()
    assert said == [1, 2, 3]
