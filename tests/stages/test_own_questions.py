"""A user's own questions through the verbs: quantize, train-qat, eval, compare."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny

from qatbench import cli, store
from qatbench.recipe_file import load_recipe
from qatbench.stages import training_sources
from qatbench.stages.dry_run import dry_run
from qatbench.stages.grid_check import check_grid, check_name
from qatbench.tasks import sources
from qatbench.vlm.load import ModelFolder

SECRET = "zq-secret-word"
HERE, GONE = "i0", "i1"  # questions whose image is there, and is not


@pytest.fixture
def mine(tmp_path: Path) -> Path:
    """Six questions, two of them with an image."""
    folder = tmp_path / "home"
    tiny.save_image(folder, "any", HERE, "red", 1)
    rows: list[dict[str, Any]] = [
        {"id": f"t{i}", "question": f"Which animal is {SECRET} {i}?", "options": options,
         "answer": i % 3, "category": "animals"}
        for i, options in enumerate([["a bird", "a fish", "nan"]] * 4)
    ]  # fmt: skip
    rows += [
        {"id": name, "question": "What color?", "options": {"A": "red", "B": "blue"},
         "answer": "red", "image": f"images/any/{name}/image.png"}
        for name in (HERE, GONE)
    ]  # fmt: skip
    file = folder / "my.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file


@pytest.fixture
def qatbench(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    work = tmp_path / "cwd"
    work.mkdir()
    monkeypatch.chdir(work)
    monkeypatch.setattr(sys, "argv", ["qatbench"])

    def call(*args: object) -> object:
        with pytest.raises(SystemExit) as ended:
            cli.main([str(arg) for arg in args])
        return ended.value.code

    return call


def test_from_eval_to_compare(
    qatbench: Any, models: dict[str, ModelFolder], data: dict[str, str], mine: Path
) -> None:
    asked = ["--task", mine, "--task", "scienceqa:test:text", "--data", data["scienceqa"]]
    asked += ["--protocol", "my=grace-sqa", "--batch-size", 2, "--max-errors", 0.2]
    for name, mode in (("base", "options"), ("again", "options"), ("written", "generate")):
        code = qatbench(
            "eval", models["llava"].path, *asked, "--mode", mode, "--out", f"runs/{name}"
        )
        assert code == 0
    rows = {row.id: row for row in store.read_predictions(Path("runs/base/predictions.jsonl"))}
    assert (rows[GONE].status, rows[GONE].error) == ("error", f"missing image {GONE}/image.png")
    assert (rows[HERE].status, rows["t1"].task, rows["t1"].gold) == ("ok", "my", "B")
    metrics = store.read_json(Path("runs/base/metrics.json"))
    task = next(one for one in metrics["tasks"] if one["task"] == "my")
    assert (task["protocol"], task["overall"]["n"], task["errors"]) == ("grace-sqa", 6, 1)
    record = store.read_json(Path("runs/base/provenance.json"))
    assert set(record["spec"]["tasks"]) == {"my:all", "scienceqa:test:text"}
    assert record["figures"]["data"]["my"] == "local files"
    written = store.read_predictions(Path("runs/written/predictions.jsonl"))
    assert all(row.raw is None for row in written)  # responses to own questions stay home

    code = qatbench("compare", "runs/base", "runs/again", "--baseline", "runs/base", "--out", "out")
    assert code == 0
    report = Path("out/report.md").read_text(encoding="utf-8")
    assert "## my" in report
    assert "grace-sqa" in report
    kept = [*Path("out").rglob("*"), *Path("runs/base").rglob("*")]
    texts = [file.read_text(encoding="utf-8", errors="replace") for file in kept if file.is_file()]
    assert not [text for text in texts if SECRET in text or str(mine.parent) in text]


def test_default_protocol_text_models_and_wrong_flags(
    qatbench: Any, models: dict[str, ModelFolder], mine: Path, capsys: Any
) -> None:
    text = models["text"].path
    assert qatbench("eval", text, "--task", f"{mine}:text", "--out", "runs/text") == 0
    (task,) = store.read_json(Path("runs/text/metrics.json"))["tasks"]
    assert (task["protocol"], task["overall"]["n"]) == ("qatbench", 4)
    capsys.readouterr()
    for flags, told in (
        (["--data", "x"], "--data x: no task needs it"),
        (["--data", "my=x"], "--data my=x: no task 'my' is asked for"),
        (["--protocol", "your=qatbench"], "no task 'your' was asked for"),
        (["--task", mine], "asked twice"),
        ([], "is a text model"),
    ):
        task_flag = f"{mine}:text" if "--task" in flags else mine
        assert qatbench("eval", text, "--task", task_flag, *flags, "--out", "runs/x") == 2
        assert told in capsys.readouterr().err
    assert not Path("runs/x").exists()


def test_quantize_and_train_on_own_questions(
    qatbench: Any, models: dict[str, ModelFolder], mine: Path
) -> None:
    text, part = models["text"].path, f"{mine}:text"
    grid = ["--group-size", tiny.GROUP, "--device", "cpu"]
    assert qatbench("quantize", text, "--method", "gptq", "--calib", part, "--samples", 4, *grid,
                    "--out", "out/gptq") == 0  # fmt: skip
    assert qatbench("train-qat", text, "--method", "qat", "--train", f"{part}@2", "--steps", 2,
                    "--batch-size", 2, *grid, "--out", "out/qat") == 0  # fmt: skip
    for name in ("gptq", "qat"):
        made = [file for file in Path("out", name).rglob("*") if file.suffix in (".json", ".md")]
        assert not [file for file in made if str(mine.parent) in file.read_text(encoding="utf-8")]


def test_a_source_of_own_questions_is_named_without_its_folder(mine: Path, tmp_path: Path) -> None:
    made = training_sources.load([training_sources.parse(f"{mine}:text@2", None)], {})
    assert [(s.name, len(s.items), s.weight) for s in made.sources] == [("my:all:text", 4, 2.0)]
    whole = training_sources.parse(f"{mine}@2", None)  # a .jsonl may hold conversations too
    assert (whole.questions, whole.conversations) == (str(mine), None)
    moved = tmp_path / "elsewhere"
    mine.parent.rename(moved)
    again = training_sources.load([training_sources.parse(f"{moved}/my.jsonl:text", None)], {})
    assert sources.digest(again.sources) == sources.digest(made.sources)


def test_a_recipe_trains_on_own_questions_and_asks_them(
    qatbench: Any, models: dict[str, ModelFolder], data: dict[str, str], mine: Path
) -> None:
    Path("r.yaml").write_text(
        f"name: own\nstudent: {models['text'].path}\n"
        f"data: {{train: '{mine}:text', calibration: '{mine}:text', "
        f"eval: ['{mine}:text', 'scienceqa:test:text'], "
        f"paths: {{scienceqa: {data['scienceqa']}}}}}\n"
        f"grid: {{group_size: {tiny.GROUP}}}\n"
        "training: {steps: 2, batch_size: 2, seeds: [0]}\n"
        "arms: {base: {kind: base}, rtn: {kind: rtn}, qat: {kind: qat}}\n"
    )
    assert qatbench("run", "r.yaml", "--device", "cpu") == 0
    report = Path("results/own/report.md").read_text(encoding="utf-8")
    assert report.index("## my") < report.index("## scienceqa")
    assert (
        "trained on as a whole were 0 of 0 questions with an image (text and pixels) and 4 of 10"
        in report
    )
    assert "my/t0 = t0" in report
    assert SECRET not in report
    assert str(mine.parent) not in report


def test_a_recipe_s_files_have_different_names(
    qatbench: Any, models: dict[str, ModelFolder], mine: Path, capsys: Any
) -> None:
    Path("my.jsonl").write_text(mine.read_text())
    Path("r.yaml").write_text(
        f"name: own\nstudent: {models['text'].path}\ngrid: {{group_size: {tiny.GROUP}}}\n"
        f"data: {{eval: ['{mine}:text', 'my.jsonl:text']}}\narms: {{base: {{kind: base}}}}\n"
    )
    assert qatbench("run", "r.yaml", "--device", "cpu") == 2
    assert "would both be the task 'my'" in capsys.readouterr().err


def test_a_recipe_may_name_own_files(mine: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"name: own\nstudent: smollm2-135m\ndata: {{train: '{mine}:text', eval: ['nowhere.jsonl']}}"
        "\ngrid: {group_size: 64}\narms: {base: {kind: base}, qat: {kind: qat}}\n"
    )
    found = dry_run(load_recipe(recipe, check_grid, check_name), tmp_path / "results", {}, "cpu")
    assert found["missing"] == ["nowhere: nowhere.jsonl"]
