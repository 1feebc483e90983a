"""eval: rows, errors, resuming, and what must not be passed on."""

from __future__ import annotations

import dataclasses
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file

from qatbench import store
from qatbench.errors import ArtifactError, NumericsError, PrerequisiteError, UsageError
from qatbench.records import Prediction, Question
from qatbench.stages import answering
from qatbench.stages import evaluate as stage
from qatbench.stages.answering import PARTIAL
from qatbench.stages.common import silent
from qatbench.stages.compare import compare
from qatbench.stages.evaluate import EvalSettings, evaluate
from qatbench.tasks import scienceqa, selector
from qatbench.vlm import answer
from qatbench.vlm.load import ModelFolder, find

GONE = "test-i2"  # the question whose image is missing in `holed`


def asking(
    *parts: str, mode: Any = "options", batch_size: int = 3, max_errors: float = 0.01
) -> EvalSettings:
    return EvalSettings(
        selectors=tuple(selector.parse(part) for part in parts or ("scienceqa:test",)),
        protocol={"scienceqa": "qatbench" if mode == "options" else "grace-sqa"},  # 8 tokens
        mode=mode,
        device="cpu",
        batch_size=batch_size,
        max_errors=max_errors,
    )


def run(
    model: ModelFolder,
    settings: EvalSettings,
    data: dict[str, str],
    out: Path,
    *,
    resume: bool = False,
    progress: Any = silent,
) -> dict[str, Any]:
    return evaluate(model, settings, data, out, resume=resume, progress=progress)


def rows_in(out: Path) -> list[Prediction]:
    return store.read_predictions(out / "predictions.jsonl")


@pytest.fixture(scope="module")
def llava(models: dict[str, ModelFolder]) -> ModelFolder:
    return models["llava"]


@pytest.fixture(scope="module")
def whole(llava: ModelFolder, data: dict[str, str], tmp_path_factory: Any) -> Path:
    """An uninterrupted run over all twelve test questions."""
    out: Path = tmp_path_factory.mktemp("runs") / "whole"
    run(llava, asking(), data, out)
    return out


@pytest.fixture
def holed(tmp_path: Path) -> dict[str, str]:
    return {"scienceqa": str(tiny.save_questions(tmp_path / "holed", missing=(GONE,)))}


def test_rows_hold_what_a_comparison_needs(whole: Path, data: dict[str, str]) -> None:
    asked = scienceqa.load(data["scienceqa"], "test")
    rows = rows_in(whole)
    assert [row.id for row in rows] == [q.id for q in asked]
    for row, question in zip(rows, asked, strict=True):
        assert (row.task, row.gold, row.status) == ("scienceqa", question.gold, "ok")
        assert row.choices == tuple(question.options)
        assert row.scores is not None
        assert set(row.scores) == set(question.options)
        assert row.chosen == max(row.scores, key=lambda letter: (row.scores or {})[letter])
        assert row.raw is None
        assert row.meta["has_image"] == question.has_image
        assert (row.meta["subject"], row.meta["category"]) == ("natural science", "Animals")
    assert len({row.chosen for row in rows}) > 1


def test_metrics_count_right_over_asked(whole: Path) -> None:
    (task,) = store.read_json(whole / "metrics.json")["tasks"]
    rows = rows_in(whole)
    right = sum(row.chosen == row.gold for row in rows)
    assert (task["overall"]["n"], task["overall"]["right"]) == (12, right)
    assert task["overall"]["chance"] == pytest.approx((9 / 3 + 3 / 4) / 12)
    assert task["groups"]["modality"]["image"]["n"] == 6
    assert (task["errors"], task["unparsed"], task["ties"]) == (0, 0, 0)


def test_a_finished_folder_is_whole_and_answered_once(
    whole: Path, llava: ModelFolder, data: dict[str, str], tmp_path: Path
) -> None:
    names = {file.name for file in whole.iterdir()}
    assert names == {"predictions.jsonl", "metrics.json", "provenance.json"}
    with pytest.raises(UsageError, match="finished"):
        run(llava, asking(), data, whole)
    record = run(llava, asking(), data, whole, resume=True)
    assert record["figures"]["prompt_form"] == "chat template, one user turn"
    copy = shutil.copytree(whole, tmp_path / "copy")
    (copy / "metrics.json").unlink()
    with pytest.raises(ArtifactError, match="is gone"):
        run(llava, asking(), data, copy, resume=True)
    torn = (copy / "predictions.jsonl").read_text()[:-20]
    (copy / "predictions.jsonl").write_text(torn)
    (copy / "metrics.json").write_text("{}")
    with pytest.raises(ArtifactError, match="line 12"):
        run(llava, asking(), data, copy, resume=True)


# --- errors -------------------------------------------------------------------------------------


def test_a_missing_image_is_an_error_row_and_counts_as_not_right(
    llava: ModelFolder, holed: dict[str, str], whole: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    run(llava, asking(max_errors=0.5), holed, out)
    rows = {row.id: row for row in rows_in(out)}
    lost = rows.pop(GONE)
    assert (lost.status, lost.chosen, lost.scores) == ("error", None, None)
    assert "image" in (lost.error or "")
    assert str(tmp_path) not in (out / "predictions.jsonl").read_text()
    before = {row.id: row for row in rows_in(whole)}
    assert {key: row.chosen for key, row in rows.items()} == {k: before[k].chosen for k in rows}
    (task,) = store.read_json(out / "metrics.json")["tasks"]
    assert (task["errors"], task["overall"]["n"]) == (1, 12)
    assert task["overall"]["right"] == sum(row.right for row in rows.values())


def refused(model: ModelFolder, data: dict[str, str], out: Path) -> None:
    with pytest.raises(ArtifactError, match=f"1 of 12 .*: 1 x missing image .*{GONE}") as caught:
        run(model, asking(), data, out)
    assert caught.value.exit_code == 4
    assert not (out / "metrics.json").exists()
    assert sum(row.status == "error" for row in rows_in(out)) == 1


def test_too_many_errors_then_the_image_comes(
    llava: ModelFolder,
    holed: dict[str, str],
    whole: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    out = tmp_path / "run"
    refused(llava, holed, out)
    number = int(GONE[-1])
    colour = list(tiny.COLOURS)[number % 3]
    tiny.save_image(Path(holed["scienceqa"]), "test", GONE, colour, number)
    answered = spy(monkeypatch)
    run(llava, asking(), holed, out, resume=True)
    # The new question takes its place by length: later batches of the twelve are formed anew.
    assert GONE in answered
    assert len(answered) < 12
    assert [row.status for row in rows_in(out)] == ["ok"] * 12
    chosen = [row.chosen for row in rows_in(out)]
    assert chosen == [row.chosen for row in rows_in(whole)]


def test_too_many_errors_then_a_larger_allowance(
    llava: ModelFolder, holed: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "run"
    refused(llava, holed, out)
    answered = spy(monkeypatch)
    run(llava, asking(max_errors=0.2), holed, out, resume=True)
    assert answered == [GONE]
    assert store.read_json(out / "metrics.json")["tasks"][0]["errors"] == 1


def test_an_image_that_changes_makes_the_folder_another_one(
    llava: ModelFolder, holed: dict[str, str], tmp_path: Path
) -> None:
    out = tmp_path / "run"
    refused(llava, holed, out)
    tiny.save_image(Path(holed["scienceqa"]), "test", "test-i0", "blue", 9)
    with pytest.raises(ArtifactError, match="other settings"):
        run(llava, asking(), holed, out, resume=True)


def test_a_text_model_refuses_image_questions_before_it_begins(
    models: dict[str, ModelFolder], data: dict[str, str], tmp_path: Path
) -> None:
    out = tmp_path / "run"
    with pytest.raises(UsageError, match="text model") as caught:
        run(models["text"], asking(), data, out)
    assert caught.value.hint.endswith("scienceqa:test:text")
    assert not out.exists()
    run(models["text"], asking("scienceqa:test:text"), data, out)
    assert len(rows_in(out)) == 6


def test_overlapping_parts_are_refused(
    llava: ModelFolder, data: dict[str, str], tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match="6 questions are asked twice"):
        run(llava, asking("scienceqa:test", "scienceqa:test:text"), data, tmp_path / "run")


def test_scores_that_are_not_numbers_end_the_run(
    models: dict[str, ModelFolder], data: dict[str, str], tmp_path: Path
) -> None:
    broken = shutil.copytree(models["text"].path, tmp_path / "broken")
    weights = load_file(broken / "model.safetensors")
    weights["model.norm.weight"][0] = float("nan")
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(NumericsError, match="not finite"):
        run(find(str(broken)), asking("scienceqa:test:text"), data, tmp_path / "run")
    assert not (tmp_path / "run" / "metrics.json").exists()


# --- resuming -----------------------------------------------------------------------------------


def spy(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Ids of the questions that are put to the model from now on."""
    asked: list[str] = []
    original = answer.answer

    def watched(encoder: Any, batch: Any, *more: Any) -> list[Prediction]:
        asked.extend(item.question.id for item in batch)
        return original(encoder, batch, *more)

    monkeypatch.setattr(answer, "answer", watched)
    return asked


@pytest.mark.parametrize("mode", ["options", "generate"])
def test_a_run_cut_in_the_middle_of_a_line_ends_as_an_uninterrupted_one(
    mode: str,
    llava: ModelFolder,
    data: dict[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    straight, cut = tmp_path / "straight", tmp_path / "cut"
    run(llava, asking(mode=mode), data, straight)

    def stop(what: str, done: int, total: int) -> None:
        if what == "Answering" and done == 9:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(llava, asking(mode=mode), data, cut, progress=stop)
    partial = (cut / PARTIAL).read_bytes()
    assert partial.count(b"\n") == 9
    (cut / PARTIAL).write_bytes(partial[:-40])  # the ninth line is torn
    with pytest.raises(UsageError, match="unfinished"):
        run(llava, asking(mode=mode), data, cut)
    answered = spy(monkeypatch)
    run(llava, asking(mode=mode), data, cut, resume=True)
    assert len(answered) == 6  # the torn batch of three, and the last
    for name in ("predictions.jsonl", *(["responses.jsonl"] if mode == "generate" else [])):
        assert (cut / name).read_bytes() == (straight / name).read_bytes()
    assert not (cut / PARTIAL).exists()


def test_a_resumed_run_counts_its_own_questions_a_second(
    llava: ModelFolder, data: dict[str, str], tmp_path: Path, whole: Path
) -> None:
    out = tmp_path / "run"
    out.mkdir()
    settings = asking()
    asked = stage.questions_of(settings.selectors, data, None, 0)
    stage.run_folder(out / "x", settings, llava.fingerprint(), asked).begin(resume=False)
    lines = (whole / "predictions.jsonl").read_text()
    (out / "x" / PARTIAL).write_text(lines)
    run(llava, settings, data, out / "x", resume=True)
    assert store.read_json(out / "x" / "metrics.json")["questions_per_second"] == 0
    assert (out / "x" / "predictions.jsonl").read_text() == lines


def test_other_settings_do_not_enter_the_folder(
    whole: Path, llava: ModelFolder, data: dict[str, str]
) -> None:
    other = dataclasses.replace(asking(), mode="generate")
    with pytest.raises(ArtifactError, match="mode"):
        run(llava, other, data, whole, resume=True)


# --- what may not be passed on ------------------------------------------------------------------


def test_nothing_of_the_data_is_in_what_is_passed_on(
    llava: ModelFolder, data: dict[str, str], holed: dict[str, str], tmp_path: Path
) -> None:
    run(llava, asking(mode="generate", max_errors=0.5), holed, tmp_path / "run")
    out = tmp_path / "run"
    told = "".join(
        (out / name).read_text()
        for name in ("predictions.jsonl", "metrics.json", "provenance.json")
    )
    asked = scienceqa.load(data["scienceqa"], "test")
    raw = [row.raw for row in store.read_predictions(out / "responses.jsonl") if row.raw]
    secrets = [q.text for q in asked] + [t for q in asked for t in q.options.values()]
    secrets += [q.hint for q in asked if q.hint] + raw
    assert len(raw) == 11
    assert tiny.SECRET_HINT in secrets
    for secret in secrets:
        assert json.dumps(secret)[1:-1] not in told
        assert secret not in told
    for row in rows_in(out):
        if row.status != "error":
            assert row.raw is None
            assert row.raw_length
            assert len(row.raw_sha256 or "") == 64


def test_responses_to_data_of_ones_own_stay_in_the_predictions(
    llava: ModelFolder, data: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(selector, "shareable", lambda task, source: True)
    run(llava, asking("scienceqa:test:image", mode="generate"), data, tmp_path / "run")
    assert all(row.raw is not None for row in rows_in(tmp_path / "run"))
    assert not (tmp_path / "run" / "responses.jsonl").exists()


def test_ties_are_counted(
    llava: ModelFolder, data: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        answer, "score_options", lambda loaded, rows: [[-2.0, -1.0, -1.0] for _ in rows]
    )
    run(llava, asking("scienceqa:test:image"), data, tmp_path / "run")
    assert {(row.chosen, row.tie) for row in rows_in(tmp_path / "run")} == {("B", True)}
    assert store.read_json(tmp_path / "run" / "metrics.json")["tasks"][0]["ties"] == 6


def test_image_controls_change_answers_and_cannot_be_mistaken(
    llava: ModelFolder, data: dict[str, str], tmp_path: Path, whole: Path
) -> None:
    for images in ("none", "shuffled"):
        settings = dataclasses.replace(asking(), images=images)
        record = run(llava, settings, data, tmp_path / images)
        assert record["spec"]["images"] == images
        pictured = {row.id for row in rows_in(whole) if row.meta["has_image"]}
        before = {row.id: row.scores for row in rows_in(whole)}
        after = {row.id: row.scores for row in rows_in(tmp_path / images)}
        changed = {key for key in before if before[key] != after[key]}
        assert changed
        assert changed <= pictured
        found = compare([tmp_path / images], whole).tasks[0]
        assert set(found.definition.images) == {"shown", images}
        assert "CONTROL_IMAGES" in {warning.code for warning in found.warnings}
    with pytest.raises(ArtifactError, match="other settings"):
        run(llava, asking(), data, tmp_path / "none", resume=True)
    assert "images" not in store.read_json(whole / store.PROVENANCE)["spec"]


# --- workers ------------------------------------------------------------------------------------


def test_two_processes_end_with_the_predictions_of_one(
    llava: ModelFolder, data: dict[str, str], whole: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    command = [
        sys.executable, "-m", "qatbench", "eval", str(llava.path), "--task", "scienceqa:test",
        "--data", data["scienceqa"], "--out", str(out), "--batch-size", "3", "--device", "cpu",
        "--jobs", "2", "--json",
    ]  # fmt: skip
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    assert (out / "predictions.jsonl").read_text() == (whole / "predictions.jsonl").read_text()
    names = {file.name for file in out.iterdir()}
    assert names == {"predictions.jsonl", "metrics.json", "provenance.json"}
    before = store.read_json(whole / "provenance.json")["fingerprint"]
    record = store.read_json(out / "provenance.json")
    assert record["fingerprint"] == before  # it is the same evaluation
    assert record["figures"]["processes"] == 2


def test_parts_answer_what_is_theirs_and_a_resumed_run_takes_it_over(
    llava: ModelFolder, data: dict[str, str], whole: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    out = tmp_path / "run"
    with pytest.raises(UsageError, match="no evaluation that was begun"):
        stage.evaluate_part(llava, asking(), data, out, (1, 2), silent)

    def stop(what: str, done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(llava, asking(), data, out, progress=stop)
    answered = spy(monkeypatch)
    stage.evaluate_part(llava, asking(), data, out, (2, 2), silent)
    assert len(answered) == 6
    half = set(answered)
    answered.clear()
    run(llava, asking(), data, out, resume=True)
    assert half.isdisjoint(answered)
    assert len(answered) == 6
    assert (out / "predictions.jsonl").read_text() == (whole / "predictions.jsonl").read_text()


# --- circular questions -------------------------------------------------------------------------


def test_passes_that_are_the_same_to_the_model_are_run_once(
    llava: ModelFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where options are not shown: their texts, hence their scores, only change places."""
    from qatbench.vlm.batch import Encoder
    from qatbench.vlm.load import load

    texts = ["a bird", "a fish", "coal and iron"]
    passes = [
        Question(
            id=str(7 + k * 1_000_000), task="mmbench", text="Which is alive?", group="7",
            options=dict(zip("ABC", texts[-k:] + texts[:-k], strict=True)), gold="ABC"[k % 3],
            circular_pass=k,
        )
        for k in range(3)
    ]  # fmt: skip
    model = load(llava, device="cpu", dtype=torch.float32)
    encoder = Encoder(model)
    apart = answer.items_of(encoder, passes, {"mmbench": "qatbench"}, "options")
    wanted = [row for item in apart for row in answer.answer(encoder, [item])]
    answered = spy(monkeypatch)
    got = answering.answer_all(
        model, {"mmbench": passes}, {"mmbench": "qatbench"}, "options",
        tmp_path / "predictions.partial.jsonl", silent,
    )  # fmt: skip
    assert answered == ["7"]
    for row, other in zip(got.rows, wanted, strict=True):
        assert row.scores == pytest.approx(other.scores, abs=2e-5)  # additions in another order
        assert row.model_copy(update={"scores": None}) == other.model_copy(update={"scores": None})
    assert len({row.chosen for row in got.rows}) == 3
    assert got.now == 3
    answered.clear()
    answering.answer_all(
        model, {"mmbench": passes}, {"mmbench": "vlmevalkit-exact"}, "options",
        tmp_path / "shown.partial.jsonl", silent,
    )  # fmt: skip
    assert len(answered) == 3


# --- the size of a batch ------------------------------------------------------------------------


def test_a_batch_takes_the_memory_that_weights_leave(
    llava: ModelFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    free = 200_000_000
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, 2 * free))

    def tokens(mode: Any = "options", workers: int = 1, dtype: torch.dtype = torch.float32) -> int:
        return answering.found_tokens(llava, "cuda", dtype, mode, workers)

    sizes = llava.config["text_config"]
    each = 4 * (4 * sizes["intermediate_size"] + 8 * sizes["hidden_size"])
    assert tokens() == int(0.6 * (free - llava.weight_bytes()) / each) > answering.ON_CPU
    assert tokens("generate") < tokens()  # its cache needs room too
    assert tokens(workers=2) < tokens() / 1.9
    assert tokens(dtype=torch.bfloat16) > 1.9 * tokens()
    free = 10**12
    assert tokens() == answering.AT_MOST
    free = llava.weight_bytes() * 2 - 1
    with pytest.raises(PrerequisiteError, match="do not fit into the"):
        tokens(workers=2)
    on_cpu = {"options": answering.OPTIONS_ON_CPU, "generate": answering.ON_CPU}
    for mode, most in on_cpu.items():
        assert answering.found_tokens(llava, "cpu", torch.float32, mode) == most  # type: ignore[arg-type]


def test_a_resumed_run_forms_the_batches_of_the_first(
    llava: ModelFolder, data: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "run"
    settings = dataclasses.replace(asking(), batch_size=None)
    longest = 90
    monkeypatch.setattr(answering, "OPTIONS_ON_CPU", 2 * longest)  # two questions a batch

    def stop(what: str, done: int, total: int) -> None:
        if what == "Answering" and done >= 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(llava, settings, data, out, progress=stop)
    done = len((out / PARTIAL).read_text().splitlines())
    monkeypatch.setattr(answering, "OPTIONS_ON_CPU", 5 * longest)  # more memory than before
    answered = spy(monkeypatch)
    record = run(llava, settings, data, out, resume=True)
    assert len(answered) == 12 - done
    assert record["figures"]["batch_size"] == f"{2 * longest} padded tokens"


@pytest.mark.parametrize(
    ("kernel", "dtype", "linear"),
    [("auto", None, "Linear"), ("library", None, "Torch"), ("auto", "bfloat16", "Torch"),
     ("dense", "bfloat16", "Linear")],
)  # fmt: skip
def test_the_record_names_the_kernel_that_multiplied(
    make: Any, data: dict[str, str], tmp_path: Path, kernel: Any, dtype: str | None, linear: str
) -> None:
    folder = find(str(make("text", "rtn", 4).path))
    settings = dataclasses.replace(asking("scienceqa:test:text"), kernel=kernel, dtype=dtype)
    figures = run(folder, settings, data, tmp_path / "run")["figures"]
    assert figures["kernel"].startswith(linear)
    assert figures["dtype"] == (dtype or "float32")  # float32 is the default of a CPU
