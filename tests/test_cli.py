from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from report.run_folders import pattern, predictions, write_run

from qatbench import __version__, cli, errors
from qatbench.cli_options import data_paths
from qatbench.stages import compare as comparing
from qatbench.tasks import selector

ROOT = Path(__file__).resolve().parents[1]
VERBS = (
    "quantize", "train-qat", "verify", "eval", "compare", "run", "tune", "card", "doctor", "score",
    "protocols", "speed", "ask",
)  # fmt: skip
WORDS = {
    "quantize": ["MODEL", "--method", "--bits", "--group-size", "--calib", "--out", "--json"],
    "train-qat": ["STUDENT", "--teacher", "--steps", "--lr", "--seed", "--resume", "--save-every"],
    "verify": ["CHECKPOINT", "--repair", "--no-load", "--json"],
    "eval": ["MODEL", "--task", "--protocol", "--mode", "--limit", "--batch-size", "--dtype"],
    "compare": ["RUNS", "--baseline", "--margin", "--max-drop", "--intersection", "--json"],
    "run": ["RECIPE", "--arm", "--limit", "--dry-run", "--device", "--json"],
    "tune": ["RECIPE", "--fold", "--json"],
    "card": ["CHECKPOINT", "RUNS", "--json"],
    "score": ["ANSWERS", "--task", "--protocol", "--data", "--split", "--out", "--json"],
    "protocols": ["NAME", "--json"],
    "speed": [
        "MODEL",
        "--engine",
        "--batch",
        "--context",
        "--repeats",
        "--task",
        "--out",
        "--json",
    ],
    "ask": ["MODEL", "QUESTION", "--image", "--max-new-tokens", "--engine", "--dtype", "--json"],
    "doctor": ["--model", "--method", "--teacher", "--batch-size", "--length", "--data", "--json"],
}
RECIPE = """\
name: dry
student: smollm2-135m
data:
  train: scienceqa:train:text
  eval: scienceqa:test:text
  paths: {scienceqa: ./not-there}
grid: {group_size: 64}
training: {seeds: [0, 1]}
arms:
  base: {kind: base}
  rtn: {kind: rtn}
  qat: {kind: qat}
"""


class Ended(NamedTuple):
    code: object
    out: str
    err: str

    @property
    def error_and_hint(self) -> tuple[str, str]:
        """The texts after `error: ` and `hint: `, which are all that stderr holds."""
        lines = self.err.splitlines()
        assert len(lines) == 2, self.err
        assert lines[0].startswith("error: "), self.err
        assert lines[1].startswith("hint: "), self.err
        assert self.out == ""
        return lines[0].removeprefix("error: "), lines[1].removeprefix("hint: ")


Qatbench = Callable[..., Ended]


@pytest.fixture
def qatbench(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Qatbench:
    """Run the command line in an empty folder."""
    empty = tmp_path / "cwd"
    empty.mkdir()
    monkeypatch.chdir(empty)
    monkeypatch.setattr(sys, "argv", ["qatbench"])
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

    def call(*args: object) -> Ended:
        with pytest.raises(SystemExit) as ended:
            cli.main([str(arg) for arg in args])
        return Ended(ended.value.code, *capsys.readouterr())

    return call


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A folder that looks like a text model from outside; no weight in it can be loaded."""
    folder = tmp_path / "model"
    folder.mkdir()
    sizes = {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_attention_heads": 2,
        "num_hidden_layers": 1,
    }
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"} | sizes))
    (folder / "model.safetensors").write_bytes(b"no weights")
    (folder / "tokenizer.json").write_text("{}")
    return folder


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Four text questions in the original ScienceQA layout."""
    folder = tmp_path / "data"
    folder.mkdir()
    fields = dict.fromkeys(("hint", "task", "grade", "subject", "topic", "category", "skill"), "")
    rows = {
        str(k): {"question": f"{k}?", "choices": ["a", "b"], "answer": 0, "image": None} | fields
        for k in range(4)
    }
    rows = {k: row | {"split": "test" if k < "2" else "train"} for k, row in rows.items()}
    (folder / "problems.json").write_text(json.dumps(rows))
    (folder / "pid_splits.json").write_text(json.dumps({"test": ["0", "1"], "train": ["2", "3"]}))
    return folder


# --- help ---------------------------------------------------------------------------------------


def plain(text: str) -> str:
    """Without the box and its line breaks."""
    return " ".join(re.sub(r"[│╭╮╰╯─]", " ", re.sub(r"\x1b\[[0-9;]*m", "", text)).split())


def test_every_verb_is_in_the_help(qatbench: Qatbench) -> None:
    registered = {command.name for command in cli.app.registered_commands}
    assert set(VERBS) <= registered
    ended = qatbench("--help")
    assert (ended.code, ended.err) == (0, "")
    assert all(str(name) in ended.out for name in registered)


@pytest.mark.parametrize("verb", VERBS)
def test_help_of_every_verb(qatbench: Qatbench, monkeypatch: pytest.MonkeyPatch, verb: str) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    ended = qatbench(verb, "--help")
    assert (ended.code, ended.err) == (0, "")
    text = plain(ended.out)
    assert f"qatbench {verb}" in text
    assert f"Example: qatbench {verb} " in text
    assert [word for word in WORDS[verb] if word.lower() not in text.lower()] == []


LONG_VERB_FLAGS = ("--batch-size", "--device", "--dtype", "--resume", "--json")


def flags_of_long_verbs() -> list[Any]:
    return [
        (verb, flag)
        for verb in ("quantize", "train-qat", "eval", "run")
        for flag in LONG_VERB_FLAGS
    ]


@pytest.mark.parametrize(("verb", "flag"), flags_of_long_verbs())
def test_every_long_verb_has_the_common_flags(
    qatbench: Qatbench, monkeypatch: pytest.MonkeyPatch, verb: str, flag: str
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    assert f" {flag} " in plain(qatbench(verb, "--help").out)


def test_version(qatbench: Qatbench) -> None:
    assert qatbench("--version") == Ended(0, f"{__version__}\n", "")


def test_no_arguments_is_help_without_an_empty_error(qatbench: Qatbench) -> None:
    ended = qatbench()
    assert "quantize" in ended.out + ended.err
    assert "error: \n" not in ended.err


# --- usage errors: exit 2, two lines ------------------------------------------------------------


@pytest.mark.parametrize(
    ("args", "said", "hint"),
    [
        (["bogus"], "bogus", "qatbench --help"),
        (["eval"], "model", "qatbench eval --help"),
        (["eval", "m", "--task", "scienceqa"], "--out", "qatbench eval --help"),
        (["quantize", "m", "--out", "x", "--colour"], "--colour", "qatbench quantize --help"),
        (["quantize", "m", "--out", "x", "--method", "bogus"], "rtn", "qatbench quantize --help"),
        (["quantize", "m", "--out", "x", "--bits", "four"], "--bits", "qatbench quantize --help"),
        (["quantize", "m", "--out", "x", "--bits", "5"], "bits = 5", "2, 3, 4 or 8"),
        (["quantize", "m", "--out", "x", "--group-size", "12"], "group size 12", "64"),
        (["quantize", "m", "--out", "x", "--protocol", "bogus"], "bogus", "llava-sqa"),
        (["quantize", "m", "--out", "x", "--calib", "mnist:train"], "mnist", "scienceqa"),
        (["eval", "m", "--task", "scienceqa", "--out", "x", "--limit", "0"], "--limit", "eval"),
        (["eval", "m", "--task", "scienceqa:test:both", "--out", "x"], "both", "image"),
        (
            ["eval", "m", "--task", "scienceqa", "--out", "x", "--protocol", "bogus"],
            "bogus",
            "llava-sqa",
        ),
        (
            ["eval", "m", "--task", "scienceqa", "--out", "x", "--protocol", "scienceqa=bogus"],
            "bogus",
            "llava-sqa",
        ),
        (
            ["train-qat", "m", "--out", "x", "--train", "scienceqa:train", "--method", "grace"],
            "needs a teacher",
            "--teacher",
        ),
        (["run", "gone.yaml"], "gone.yaml", "recipe"),
        (["tune", "gone.yaml"], "gone.yaml", "recipe"),
    ],
    ids=lambda value: "_".join(value[:1] + value[-2:]) if isinstance(value, list) else "",
)
def test_usage_errors_are_two_lines_and_exit_2(
    qatbench: Qatbench, args: list[str], said: str, hint: str
) -> None:
    ended = qatbench(*args)
    assert ended.code == 2
    told, advised = ended.error_and_hint
    assert said in told
    assert hint in advised
    assert not list(Path().iterdir())


def test_a_protocol_for_another_task_is_told_with_a_hint(qatbench: Qatbench) -> None:
    flags = ("--task", "scienceqa", "--out", "x", "--protocol", "mmbench=llava-sqa")
    assert "mmbench" in qatbench("eval", "m", *flags).error_and_hint[0]


def test_every_problem_of_a_recipe_is_in_one_error(qatbench: Qatbench) -> None:
    Path("r.yaml").write_text(RECIPE.replace("64", "128") + "  a: {kind: rtn, colour: red}\nx: 1\n")
    ended = qatbench("run", "r.yaml", "--dry-run")
    assert ended.code == 2
    lines = ended.err.splitlines()
    assert re.match(r"error: r\.yaml:\d+: ", lines[0])
    assert any("r.yaml:13: arms.a.colour" in line for line in lines)
    assert any("r.yaml:14: x" in line for line in lines)
    assert any("r.yaml:7: grid: group_size 128 does not divide" in line for line in lines)
    assert lines[-1].startswith("hint: ")


def test_data_without_a_task_is_for_the_only_task() -> None:
    assert data_paths(["mini"], ["scienceqa", "scienceqa"]) == {"scienceqa": "mini"}
    assert data_paths(["mmbench=a", "scienceqa=b"], ["scienceqa", "mmbench"]) == {
        "mmbench": "a",
        "scienceqa": "b",
    }
    assert data_paths(None, ["scienceqa"]) == {}


def test_data_without_a_task_needs_one_where_there_are_two(
    qatbench: Qatbench, monkeypatch: pytest.MonkeyPatch, model: Path
) -> None:
    monkeypatch.setitem(selector.TASKS, "other", selector.TASKS["scienceqa"])
    tasks = ("--task", "scienceqa", "--task", "other", "--out", "x")
    ended = qatbench("eval", model, *tasks, "--data", "mini-text")
    assert ended.code == 2
    assert ended.error_and_hint == ("--data mini-text: which task?", "--data TASK=PATH")


def test_data_for_another_task_is_a_usage_error() -> None:
    with pytest.raises(errors.UsageError, match="sciencqa"):
        data_paths(["sciencqa=DIR"], ["scienceqa"])


@pytest.mark.parametrize(
    "flags",
    [
        ("--dtype", "float99"),
        ("--dtype", "float99", "--limit", "1"),
        ("--protocol", "bogus"),
    ],
)
def test_a_usage_error_leaves_no_unfinished_folder(
    qatbench: Qatbench, model: Path, data: Path, flags: tuple[str, ...]
) -> None:
    task = ("--task", "scienceqa:test:text", "--data", data, "--device", "cpu")
    assert qatbench("eval", model, *task, "--out", "x", *flags).code == 2
    assert not Path("x").exists()


# --- the other exit codes -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "code"),
    [
        (errors.UsageError, 2),
        (errors.RecipeError, 2),
        (errors.PrerequisiteError, 3),
        (errors.ArtifactError, 4),
        (errors.NumericsError, 5),
        (errors.ShapeError, 5),
    ],
)
def test_expected_errors_end_with_their_code(
    qatbench: Qatbench,
    monkeypatch: pytest.MonkeyPatch,
    kind: type[errors.QatbenchError],
    code: int,
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise kind("what, where", hint="the command")

    monkeypatch.setattr(comparing, "compare", fail)
    ended = qatbench("compare", "a", "--baseline", "b")
    assert ended.code == code
    assert ended.error_and_hint == ("what, where", "the command")


def stop(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(comparing, "compare", fail)


@pytest.mark.parametrize("error", [ValueError("odd"), OSError("disk full"), KeyError("k")])
def test_an_unexpected_error_is_a_bug_with_its_traceback(
    qatbench: Qatbench, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    stop(monkeypatch, error)
    ended = qatbench("compare", "a", "--baseline", "b")
    assert ended.code == 70
    lines = ended.err.splitlines()
    assert lines[0].startswith("Traceback")
    assert any(type(error).__name__ in line and str(error) in line for line in lines)
    assert lines[-2].startswith("error: ")
    assert lines[-1].startswith("hint: ")
    assert ended.out == ""


def test_ctrl_c_is_130_without_a_traceback(
    qatbench: Qatbench, monkeypatch: pytest.MonkeyPatch
) -> None:
    stop(monkeypatch, KeyboardInterrupt())
    ended = qatbench("compare", "a", "--baseline", "b")
    assert ended.code == 130
    assert "Traceback" not in ended.err
    assert ended.out == ""


def test_ctrl_c_says_so(qatbench: Qatbench, monkeypatch: pytest.MonkeyPatch) -> None:
    stop(monkeypatch, KeyboardInterrupt())
    lines = qatbench("compare", "a", "--baseline", "b").err.splitlines()
    assert "error: interrupted" in lines


def test_a_closed_pipe_is_no_verdict(qatbench: Qatbench, monkeypatch: pytest.MonkeyPatch) -> None:
    stop(monkeypatch, BrokenPipeError(32, "Broken pipe"))
    assert qatbench("compare", "a", "--baseline", "b").code != 1


VERBS_OF_A_MODEL = {
    "eval": ("--task", "scienceqa:test:text"),
    "quantize": ("--method", "rtn", "--group-size", "64"),
    "train-qat": ("--method", "qat", "--train", "scienceqa:train:text"),
}


@pytest.mark.parametrize("verb", VERBS_OF_A_MODEL)
def test_a_model_that_is_not_there_is_exit_3(
    qatbench: Qatbench, tmp_path: Path, data: Path, verb: str
) -> None:
    gone = tmp_path / "gone"
    flags = (*VERBS_OF_A_MODEL[verb], "--data", f"scienceqa={data}", "--out", "x")
    ended = qatbench(verb, gone, *flags)
    assert ended.code == 3
    assert f"no model at {gone}" in ended.error_and_hint[0]
    assert not Path("x").exists()


@pytest.mark.parametrize(
    ("lost", "what"),
    [
        ("tokenizer.json", "no tokenizer in"),
        ("model.safetensors", "no safetensors weights in"),
        ("config.json", "no config.json in"),
    ],
)
@pytest.mark.parametrize("verb", VERBS_OF_A_MODEL)
def test_a_model_without_one_of_its_parts_is_exit_3(
    qatbench: Qatbench, model: Path, data: Path, verb: str, lost: str, what: str
) -> None:
    (model / lost).unlink()
    flags = (*VERBS_OF_A_MODEL[verb], "--data", f"scienceqa={data}", "--out", "x")
    ended = qatbench(verb, model, *flags)
    assert ended.code == 3
    assert what in ended.error_and_hint[0]
    assert not Path("x").exists()


def test_a_vlm_without_its_processor_is_exit_3(qatbench: Qatbench, model: Path) -> None:
    text = (model / "config.json").read_text()
    (model / "config.json").write_text(text.replace('"llama"', '"llava"'))
    ended = qatbench("eval", model, "--task", "scienceqa", "--out", "x")
    assert ended.code == 3
    assert "no processor in" in ended.error_and_hint[0]


def test_a_damaged_config_is_exit_4(qatbench: Qatbench, model: Path) -> None:
    (model / "config.json").write_text("{")
    assert qatbench("eval", model, "--task", "scienceqa", "--out", "x").code == 4


def test_a_text_model_is_not_asked_about_images(
    qatbench: Qatbench, model: Path, data: Path
) -> None:
    rows = json.loads((data / "problems.json").read_text())
    rows["1"]["image"] = "image.png"
    (data / "problems.json").write_text(json.dumps(rows))
    ended = qatbench("eval", model, "--task", "scienceqa:test", "--data", data, "--out", "x")
    assert ended.code == 2
    assert "text model" in ended.error_and_hint[0]
    assert ":text" in ended.error_and_hint[1]


def test_compare_of_runs_that_are_not_there_is_exit_3(qatbench: Qatbench) -> None:
    ended = qatbench("compare", "a", "b", "--baseline", "a", "--out", "c")
    assert ended.code == 3
    assert "no such run folder: a" in ended.error_and_hint[0]
    assert "qatbench eval" in ended.error_and_hint[1]
    assert not Path("c").exists()


# --- the verdict of compare ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("right", "max_drop", "code"),
    [
        (85, None, 0),
        (85, 4, 1),  # 5 points below
        (85, 6, 0),
        (90, 0, 0),
        (95, 0, 0),  # above is no drop
        (83, 7, 0),  # 100 * 0.07 > 7 in binary
    ],
)
def test_max_drop_is_exit_1_when_an_arm_is_further_below(
    qatbench: Qatbench, right: int, max_drop: int | None, code: int
) -> None:
    write_run(Path("r/base"), predictions(pattern(100, 90)))
    write_run(Path("r/arm"), predictions(pattern(100, right)))
    flags = () if max_drop is None else ("--max-drop", max_drop)
    ended = qatbench(
        "compare", "r/base", "r/arm", "--baseline", "r/base", "--draws", 100, "--json", *flags
    )
    assert ended.code == code, ended.err
    assert json.loads(ended.out)["baseline"] == "base"
    assert ended.out.count("\n") == 1
    assert Path("comparison/report.md").exists()  # the verdict comes after the report
    assert ("verdict: " in ended.err) == (code == 1)


def test_the_table_is_for_people(qatbench: Qatbench) -> None:
    for arm in ("base", "arm"):
        write_run(Path("r") / arm, predictions([1, 1, 0, 1]))
    ended = qatbench("compare", "r/arm", "--baseline", "r/base", "--draws", 100, "--out", "c")
    assert ended.code == 0
    assert "75.0" in ended.out
    assert "report: c/report.md" in ended.out


def test_a_path_is_printed_as_it_is(qatbench: Qatbench) -> None:
    for arm in ("base", "arm"):
        write_run(Path("r") / arm, predictions([1, 1, 0, 1]))
    out = Path("[b]" + "long" * 30)
    ended = qatbench("compare", "r/arm", "--baseline", "r/base", "--draws", 100, "--out", out)
    assert f"report: {out}/report.md\n" in ended.out


def test_compare_names_the_next_command(qatbench: Qatbench) -> None:
    for arm in ("base", "arm"):
        write_run(Path("r") / arm, predictions([1, 1, 0, 1]))
    ended = qatbench("compare", "r/arm", "--baseline", "r/base", "--draws", 100)
    assert "next: qatbench" in ended.err


# --- run --dry-run ------------------------------------------------------------------------------


def snapshot(folder: Path) -> dict[str, tuple[int, bytes]]:
    return {
        str(path.relative_to(folder)): (path.stat().st_mtime_ns, path.read_bytes())
        for path in folder.rglob("*")
        if path.is_file()
    } | {str(path.relative_to(folder)): (0, b"") for path in folder.rglob("*") if path.is_dir()}


def test_dry_run_and_help_need_no_torch_and_touch_nothing(tmp_path: Path) -> None:
    work, home = tmp_path / "work", tmp_path / "home"
    work.mkdir()
    (work / "r.yaml").write_text(RECIPE)
    done = work / "results" / "dry"
    for unit in ("base", "checkpoints/rtn"):
        (done / unit).mkdir(parents=True)
        (done / unit / "provenance.json").write_text("{}")
    before = snapshot(tmp_path)
    code = """
import contextlib, io, sys
from qatbench.cli import main
def ended(*args):
    try:
        main(list(args))
    except SystemExit as end:
        assert end.code == 0, end.code
with contextlib.redirect_stdout(io.StringIO()) as text:
    ended("--help")
    ended("run", "--help")
assert "train-qat" in text.getvalue()
ended("run", "r.yaml", "--dry-run", "--json")
slow = {"torch", "transformers", "scipy", "numpy", "datasets", "gptqmodel"} & set(sys.modules)
assert not slow, slow
"""
    cache = {"HOME": str(home), "XDG_CACHE_HOME": str(home / "cache")}
    environment = {**os.environ, **cache, "PYTHONPATH": str(ROOT)}
    ended = subprocess.run(
        [sys.executable, "-B", "-c", code],
        cwd=work,
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )

    assert (ended.returncode, ended.stderr) == (0, "")
    assert ended.stdout.count("\n") == 1  # one line, one object
    found = json.loads(ended.stdout)
    assert found["recipe"] == "dry"
    assert found["missing"] == ["scienceqa: ./not-there"]
    units = {row["unit"]: row for row in found["units"]}
    assert list(units) == ["base", "rtn", "qat/seed-0", "qat/seed-1"]
    assert units["base"]["evaluated"]
    assert not units["rtn"]["evaluated"]
    assert units["rtn"]["checkpoint"]
    assert not units["qat/seed-0"]["checkpoint"]
    assert units["qat/seed-0"]["seconds"] > units["rtn"]["seconds"] > 0
    assert all(row[key] is not None for row in units.values() for key in ("memory_gib", "disk_gib"))
    assert snapshot(tmp_path) == before


def dry(qatbench: Qatbench, *flags: object) -> dict[str, Any]:
    Path("r.yaml").write_text(RECIPE)
    ended = qatbench("run", "r.yaml", "--dry-run", "--json", *flags)
    assert (ended.code, ended.err) == (0, "")
    found: dict[str, Any] = json.loads(ended.out)
    return found


def test_dry_run_takes_data_from_the_command_line(qatbench: Qatbench) -> None:
    assert dry(qatbench)["missing"] == ["scienceqa: ./not-there"]
    assert dry(qatbench, "--data", "mini-text")["missing"] == []
    Path("not-there").mkdir()
    assert dry(qatbench)["missing"] == []


def test_dry_run_table_names_every_unit(qatbench: Qatbench) -> None:
    Path("r.yaml").write_text(RECIPE)
    ended = qatbench("run", "r.yaml", "--dry-run")
    assert (ended.code, ended.err) == (0, "")
    assert all(name in ended.out for name in ("base", "rtn", "qat/seed-0", "qat/seed-1"))
    assert "scienceqa: ./not-there" in ended.out


def test_dry_run_of_a_model_only_the_hub_knows_has_no_estimates(qatbench: Qatbench) -> None:
    Path("r.yaml").write_text(RECIPE.replace("smollm2-135m", "owner/name"))
    ended = qatbench("run", "r.yaml", "--dry-run", "--json")
    assert ended.code == 0
    assert all(row["seconds"] is None for row in json.loads(ended.out)["units"])


def test_dry_run_without_the_student_is_an_error(qatbench: Qatbench) -> None:
    Path("r.yaml").write_text(RECIPE.replace("smollm2-135m", "./gone"))
    ended = qatbench("run", "r.yaml", "--dry-run", "--json")
    assert ended.code in (2, 3)
    assert "no model at ./gone" in ended.err
    assert ended.out == ""


def test_dry_run_of_one_arm(qatbench: Qatbench) -> None:
    units = [row["unit"] for row in dry(qatbench, "--arm", "qat")["units"]]
    assert units == ["qat/seed-0", "qat/seed-1"]


def test_dry_run_of_one_seed(qatbench: Qatbench) -> None:
    units = [row["unit"] for row in dry(qatbench, "--seed", 1)["units"]]
    assert "qat/seed-1" in units
    assert "qat/seed-0" not in units


def test_dry_run_of_autoround_grows_with_its_iterations(qatbench: Qatbench) -> None:
    seconds = []
    for iters in (10, 100):
        calibrated = RECIPE.replace("  eval:", "  calibration: scienceqa:train:text\n  eval:")
        settings = f"calibration: {{iters: {iters}}}\narms:\n  gptq: {{kind: gptq}}\n"
        text = calibrated.replace("arms:\n", settings + "  auto: {kind: autoround}\n")
        Path("r.yaml").write_text(text)
        units = json.loads(qatbench("run", "r.yaml", "--dry-run", "--json").out)["units"]
        seconds.append({row["unit"]: row["seconds"] for row in units})
    assert seconds[0]["gptq"] == seconds[1]["gptq"] < seconds[0]["auto"]
    ten, hundred = (row["auto"] - row["gptq"] for row in seconds)
    assert hundred == pytest.approx(10 * ten, rel=0.01)  # a tenth of a second is rounded away


def test_dry_run_asks_nothing_for_what_is_evaluated(qatbench: Qatbench) -> None:
    before = dry(qatbench)["units"]
    done = Path("results", "dry", "base")
    done.mkdir(parents=True)
    (done / "provenance.json").write_text("{}")
    after = dry(qatbench)["units"]
    assert before[0]["seconds"] > 0
    assert [after[0][key] for key in ("seconds", "memory_gib", "disk_gib")] == [0, 0, 0]
    assert after[1:] == before[1:]


def test_dry_run_with_a_limit_costs_less(qatbench: Qatbench) -> None:
    whole, part = dry(qatbench), dry(qatbench, "--limit", 10)
    assert part["units"][0]["seconds"] < whole["units"][0]["seconds"] / 100
