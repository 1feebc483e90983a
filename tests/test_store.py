from __future__ import annotations

import gzip
import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from qatbench import store
from qatbench.errors import ArtifactError, UsageError
from qatbench.records import Prediction
from qatbench.store import RunFolder, State

SPEC = {"model": "f00d", "bits": 4, "controller": {"rate": 0.003}}


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    return RunFolder(tmp_path / "run", "quantize", SPEC)


def finish(folder: RunFolder) -> dict[str, object]:
    return folder.finish(inputs={"model": "f00d"}, seconds=1.23456, machine={}, figures={"n": 1})


def names(path: Path) -> list[str]:
    return sorted(child.name for child in path.iterdir())


# --- writing ------------------------------------------------------------------------------------


def test_write_makes_the_folder_replaces_and_leaves_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b" / "x.txt"
    store.write_text(path, "old")
    store.write_text(path, "new ä\n")

    assert path.read_bytes() == "new ä\n".encode()
    assert names(path.parent) == ["x.txt"]
    assert path.stat().st_mode & 0o777 == 0o644  # not the 0600 of a temporary file


@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt()])
@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_failing_write_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str, error: BaseException
) -> None:
    path = tmp_path / "x.txt"
    store.write_text(path, "old")

    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(os, step, fail)
    with pytest.raises(type(error)):
        store.write_text(path, "new")

    assert path.read_text() == "old"
    assert names(tmp_path) == ["x.txt"]


def test_text_that_cannot_be_encoded_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "x.txt"
    store.write_text(path, "old")
    with pytest.raises(UnicodeEncodeError):
        store.write_text(path, "n" * 100_000 + "\ud800")
    assert path.read_text() == "old"
    assert names(tmp_path) == ["x.txt"]


def test_a_reader_never_sees_half(tmp_path: Path) -> None:
    path = tmp_path / "x.txt"
    texts = {"a" * 200_000, "b" * 200_000}
    store.write_text(path, "a" * 200_000)
    seen: set[str] = set()
    stop = threading.Event()

    def read() -> None:
        while not stop.is_set():
            seen.add(path.read_text())

    reader = threading.Thread(target=read)
    reader.start()
    for text in [*texts] * 20:
        store.write_text(path, text)
    stop.set()
    reader.join()
    assert seen <= texts


def test_json_round_trip_refuses_nan(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    store.write_json(path, {"é": [1, None]})
    assert store.read_json(path) == {"é": [1, None]}
    assert path.read_text(encoding="utf-8").endswith("}\n")
    with pytest.raises(ValueError, match="not JSON compliant"):
        store.write_json(path, {"loss": float("nan")})
    assert store.read_json(path) == {"é": [1, None]}


@pytest.mark.parametrize("text", ["", "{", "[1]", "null", '{"a": 1}}', "\xff"])
def test_damaged_json_is_an_artifact_error(tmp_path: Path, text: str) -> None:
    path = tmp_path / "x.json"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(ArtifactError, match=r"x\.json"):
        store.read_json(path)


def test_fingerprint_knows_values_not_key_order() -> None:
    one = store.fingerprint({"a": 1, "b": {"c": [1, 2], "d": None}})
    assert one == store.fingerprint({"b": {"d": None, "c": [1, 2]}, "a": 1})
    assert len(one) == 16
    others = [
        {"a": 1, "b": {"c": [2, 1], "d": None}},
        {"a": 1, "b": {"c": [1, 2]}},
        {"a": "1", "b": {"c": [1, 2], "d": None}},
        {"a": 1, "b": {"c": [1, 2], "d": 0}},
    ]
    assert len({one, *map(store.fingerprint, others)}) == 5


def test_fingerprint_is_the_same_in_every_release() -> None:
    # sha256 of '{"a":1,"b":"\u00e9"}': finished work of older releases stays recognised
    assert store.fingerprint({"b": "é", "a": 1}) == "6071e7aa781e8adc"


# --- the life of a run folder -------------------------------------------------------------------


def test_new_unfinished_resumed_finished(folder: RunFolder) -> None:
    assert folder.state() is State.NEW
    assert not folder.path.exists()  # looking does not make it

    assert folder.begin(resume=False) is State.NEW
    assert names(folder.path) == ["unfinished.json"]
    assert folder.state() is State.RESUME

    with pytest.raises(UsageError, match="is unfinished") as caught:
        folder.begin(resume=False)
    assert caught.value.exit_code == 2
    assert "--resume" in caught.value.hint
    assert folder.begin(resume=True) is State.RESUME

    record = finish(folder)
    assert names(folder.path) == ["provenance.json"]
    assert store.read_json(folder.path / "provenance.json") == record
    assert record["fingerprint"] == folder.fingerprint
    assert record["spec"] == SPEC
    assert record["schema_version"] == 1
    assert record["versions"]["qatbench"]
    assert folder.state() is State.DONE

    with pytest.raises(UsageError, match="already finished") as caught:
        folder.begin(resume=False)
    assert caught.value.exit_code == 2
    assert "--resume" in caught.value.hint
    assert folder.begin(resume=True) is State.DONE

    folder.discard()
    assert folder.state() is State.NEW


def test_resume_with_nothing_saved_starts_from_the_beginning(folder: RunFolder) -> None:
    assert folder.begin(resume=True) is State.NEW
    assert folder.state() is State.RESUME


def test_an_empty_folder_is_new(folder: RunFolder) -> None:
    folder.path.mkdir()
    assert folder.begin(resume=False) is State.NEW


def test_cut_off_after_provenance_is_finished(folder: RunFolder) -> None:
    folder.begin(resume=False)
    kept = (folder.path / "unfinished.json").read_text()
    finish(folder)
    (folder.path / "unfinished.json").write_text(kept)
    assert folder.state() is State.DONE


@pytest.mark.parametrize("finished", [False, True])
@pytest.mark.parametrize(
    ("stage", "spec", "told", "untold"),
    [
        ("quantize", SPEC | {"bits": 3}, ["bits 4 there, 3 here"], ["model", "rate"]),
        (
            "quantize",
            SPEC | {"controller": {"rate": 0.1}},
            ["controller.rate 0.003 there, 0.1 here"],
            ["bits", "model"],
        ),
        ("quantize", SPEC | {"seed": 1}, ["seed None there, 1 here"], ["bits"]),
        ("train", SPEC, ["stage 'quantize' there, 'train' here"], ["bits"]),
    ],
)
def test_other_settings_are_named(
    folder: RunFolder,
    stage: str,
    spec: dict[str, object],
    told: list[str],
    untold: list[str],
    finished: bool,
) -> None:
    folder.begin(resume=False)
    if finished:
        finish(folder)
    before = names(folder.path)
    other = RunFolder(folder.path, stage, spec)

    for resume in (False, True):
        with pytest.raises(ArtifactError, match="other settings") as caught:
            other.begin(resume=resume)
        assert caught.value.exit_code == 4
        assert caught.value.hint
        said = caught.value.message.partition("other settings")[2]
        assert all(text in said for text in told)
        assert not any(text in said for text in untold)
    assert names(folder.path) == before


def test_an_equal_tuple_is_not_named_as_different(tmp_path: Path) -> None:
    spec = {"bits": 4, "formats": ("qatbench",)}
    RunFolder(tmp_path / "run", "train", spec).begin(resume=False)
    with pytest.raises(ArtifactError, match="bits 4 there, 3 here") as caught:
        RunFolder(tmp_path / "run", "train", spec | {"bits": 3}).state()
    assert "formats" not in caught.value.message


@pytest.mark.parametrize("resume", [False, True])
def test_foreign_files_are_not_touched(folder: RunFolder, resume: bool) -> None:
    folder.path.mkdir()
    (folder.path / "thesis.txt").write_text("mine")
    with pytest.raises(UsageError, match="holds something else") as caught:
        folder.begin(resume=resume)
    assert caught.value.exit_code == 2
    assert "--out" in caught.value.hint
    assert names(folder.path) == ["thesis.txt"]


def test_a_file_where_the_folder_belongs(folder: RunFolder) -> None:
    folder.path.write_text("mine")
    with pytest.raises(UsageError, match="holds something else"):
        folder.begin(resume=False)
    assert folder.path.read_text() == "mine"


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"fingerprint": 5, "spec": []}'])
@pytest.mark.parametrize("name", ["provenance.json", "unfinished.json"])
def test_a_damaged_record_is_an_artifact_error(folder: RunFolder, name: str, text: str) -> None:
    folder.path.mkdir()
    (folder.path / name).write_text(text)
    with pytest.raises(ArtifactError) as caught:
        folder.begin(resume=True)
    assert caught.value.exit_code == 4
    assert str(folder.path) in caught.value.message


# --- predictions --------------------------------------------------------------------------------


def line(number: int, raw: str = "A") -> str:
    return Prediction(
        id=str(number), task="t", choices=("A", "B"), gold="A", chosen="A", status="ok", raw=raw
    ).model_dump_json()


@pytest.mark.parametrize("end", ["", "\n"])
def test_predictions_round_trip(tmp_path: Path, end: str) -> None:
    path = tmp_path / "predictions.jsonl"
    # U+2028 and NEL end a line for str.splitlines, not in this format
    raws = ["A", "a\nb", "\u2028\x85", "ä"]
    path.write_text(
        "\n".join(line(k, raw) for k, raw in enumerate(raws)) + end, encoding="utf-8", newline=""
    )
    for torn_tail in (False, True):
        rows = store.read_predictions(path, torn_tail=torn_tail)
        assert [row.id for row in rows] == ["0", "1", "2", "3"]
        assert [row.raw for row in rows] == raws


def test_an_empty_file_holds_no_predictions(tmp_path: Path) -> None:
    (tmp_path / "p.jsonl").touch()
    assert store.read_predictions(tmp_path / "p.jsonl") == []


@pytest.mark.parametrize("cut", [1, 20, len(line(2)) - 1])
def test_a_torn_last_line_is_dropped_only_when_asked(tmp_path: Path, cut: int) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text(f"{line(0)}\n{line(1)}\n{line(2)[:cut]}")

    assert [row.id for row in store.read_predictions(path, torn_tail=True)] == ["0", "1"]
    with pytest.raises(ArtifactError, match=r"damaged line 3 in .*p\.jsonl"):
        store.read_predictions(path)


def test_a_line_torn_inside_a_letter_is_dropped_too(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    whole = f"{line(0)}\n{line(1, raw='ä')}".encode()
    path.write_bytes(whole[: whole.index("ä".encode()) + 1])
    assert [row.id for row in store.read_predictions(path, torn_tail=True)] == ["0"]


@pytest.mark.parametrize("bad", ["", "{", "[]", '{"id": "1"}', line(1)[:-1] + ',"extra":1}'])
@pytest.mark.parametrize("torn_tail", [False, True])
def test_a_damaged_middle_line_is_told_with_its_number(
    tmp_path: Path, bad: str, torn_tail: bool
) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text(f"{line(0)}\n{bad}\n{line(2)}\n")
    with pytest.raises(ArtifactError, match=r"damaged line 2 in .*p\.jsonl") as caught:
        store.read_predictions(path, torn_tail=torn_tail)
    assert caught.value.exit_code == 4
    assert caught.value.hint


def test_a_whole_but_wrong_last_line_is_not_torn(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text(f"{line(0)}\n{{\n")  # it has its newline: nobody was cut off in it
    with pytest.raises(ArtifactError, match="damaged line 2"):
        store.read_predictions(path, torn_tail=True)


def test_a_byte_that_is_no_text_is_damage(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    path.write_bytes(line(10).encode().replace(b'"10"', b'"1\xff"') + f"\n{line(2)}\n".encode())
    with pytest.raises(ArtifactError, match="damaged line 1"):
        store.read_predictions(path)


def test_predictions_that_are_gone_are_damage(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"p\.jsonl"):
        store.read_predictions(tmp_path / "p.jsonl")


# --- the lock -----------------------------------------------------------------------------------


def test_the_lock_keeps_another_out_until_it_is_given_back(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "artifact"
    inside = threading.Event()

    def enter(where: Path = path) -> None:
        with store.locked(where):
            inside.set()

    other = threading.Thread(target=enter)
    with store.locked(path):
        assert not path.exists()  # the lock lies beside it, so the folder is still new
        other.start()
        assert not inside.wait(0.3)
        beside = threading.Thread(target=enter, args=(path.with_name("another"),))
        beside.start()
        assert inside.wait(5)  # another artifact is not kept waiting
        beside.join()
        inside.clear()
        assert not inside.wait(0.1)
    assert inside.wait(5)
    other.join()


def test_the_lock_is_given_back_after_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="inside"), store.locked(tmp_path / "x"):
        raise ValueError("inside")
    free = threading.Event()

    def enter() -> None:
        with store.locked(tmp_path / "x"):
            free.set()

    threading.Thread(target=enter, daemon=True).start()
    assert free.wait(5)


def test_the_lock_excludes_another_process(tmp_path: Path) -> None:
    log = tmp_path / "log"
    code = f"""
from pathlib import Path
from qatbench import store
print("ready", flush=True)
with store.locked(Path({str(tmp_path / "x")!r})), open({str(log)!r}, "a") as stream:
    stream.write("child\\n")
"""
    with store.locked(tmp_path / "x"):
        child = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
        assert child.stdout
        assert child.stdout.readline() == "ready\n"
        time.sleep(0.3)
        log.write_text("parent\n")
    assert child.wait(30) == 0
    child.stdout.close()
    assert log.read_text() == "parent\nchild\n"


def test_versions_name_what_decides_a_number() -> None:
    found = store.versions()
    assert {"python", "qatbench", "torch", "transformers", "numpy"} <= found.keys()
    json.dumps(found)


def test_the_cache_follows_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert store.cache_folder() == tmp_path / "qatbench"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert store.cache_folder() == tmp_path / "home" / ".cache" / "qatbench"


def test_predictions_may_be_gzipped(tmp_path: Path) -> None:
    line = b'{"id":"1","task":"t","choices":["A","B"],"gold":"A","chosen":"A","status":"ok"}\n'
    plain, packed = tmp_path / "predictions.jsonl", tmp_path / "predictions.jsonl.gz"
    assert store.predictions_file(tmp_path) == plain  # what an error message should name
    packed.write_bytes(gzip.compress(line * 3))
    assert store.predictions_file(tmp_path) == packed
    assert [row.chosen for row in store.read_predictions(packed)] == ["A"] * 3
    packed.write_bytes(gzip.compress(line * 3)[:-9])
    with pytest.raises(ArtifactError, match=r"cannot read .*predictions\.jsonl\.gz"):
        store.read_predictions(packed)
    packed.write_bytes(line)
    with pytest.raises(ArtifactError, match="cannot read"):
        store.read_predictions(packed)
    plain.write_bytes(line)
    assert store.predictions_file(tmp_path) == plain
