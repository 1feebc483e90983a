"""The models that ship with the package: whole, or one clear error."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from safetensors import safe_open

from qatbench.errors import ArtifactError, UsageError
from qatbench.mini import models
from qatbench.vlm import builtin
from qatbench.vlm.load import find


@pytest.fixture
def copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    shutil.copytree(builtin.WEIGHTS, tmp_path / "weights")
    monkeypatch.setattr(builtin, "WEIGHTS", tmp_path / "weights")
    return tmp_path / "weights"


@pytest.mark.parametrize("name", builtin.MINI)
def test_shipped_models_are_what_the_code_builds(name: str, tmp_path: Path) -> None:
    folder = find(name)
    assert folder.arch.is_vlm
    built = models.build(name.removeprefix("mini/"), 0)
    models.save(built, tmp_path / "built")
    same = ("config.json", "tokenizer.json", "processor_config.json", "chat_template.jinja")
    for file in same:
        assert (folder.path / file).read_bytes() == (tmp_path / "built" / file).read_bytes(), file
    shapes = {key: tuple(value.shape) for key, value in built.state_dict().items()}
    stored = {}
    for shard in folder.path.glob("*.safetensors"):
        assert shard.stat().st_size < 16_000_000
        with safe_open(shard, "pt") as tensors:
            for key in tensors.keys():  # noqa: SIM118
                stored[key] = tuple(tensors.get_slice(key).get_shape())
    assert sorted(stored.values()) == sorted(shapes.values())


def test_both_models_are_small_enough_to_ship() -> None:
    files = [file for file in builtin.WEIGHTS.rglob("*") if file.is_file()]
    assert sum(file.stat().st_size for file in files) <= 28_000_000


@pytest.mark.parametrize("damage", ["missing", "damaged"])
def test_a_bad_shard_is_one_clear_error(damage: str, copy: Path) -> None:
    shard = copy / "teacher" / "model-00002-of-00002.safetensors"
    if damage == "missing":
        shard.unlink()
    else:
        data = bytearray(shard.read_bytes())
        data[-1] ^= 1
        shard.write_bytes(bytes(data))
    with pytest.raises(ArtifactError, match=f"model-00002-of-00002.safetensors is {damage}"):
        find("mini/teacher")
    assert find("mini/student").path == copy / "student"


def test_no_weights_at_all_is_said(copy: Path) -> None:
    shutil.rmtree(copy)
    with pytest.raises(ArtifactError, match="weights are missing"):
        find("mini/student")


def test_the_manifest_names_every_file(copy: Path) -> None:
    before = (copy / builtin.MANIFEST).read_bytes()
    builtin.write_manifest(copy)
    assert (copy / builtin.MANIFEST).read_bytes() == before
    assert len(json.loads(before)) == len([f for f in copy.glob("*/*") if f.is_file()])


def test_a_wheel_holds_the_weights(tmp_path: Path) -> None:
    root = Path(__file__).parents[2]
    source = tmp_path / "source"
    ignored = shutil.ignore_patterns("__pycache__", ".*", "tests", "results", "benchmarks")
    shutil.copytree(root, source, ignore=ignored)
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-index",
               "--no-build-isolation", "--wheel-dir", str(tmp_path), str(source)]  # fmt: skip
    subprocess.run(command, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert "qatbench/stages/card.md.jinja" in names
    inside = {name.removeprefix("qatbench/mini/weights/") for name in names}
    listed = json.loads((builtin.WEIGHTS / builtin.MANIFEST).read_text())
    assert {*listed, builtin.MANIFEST} <= inside


def test_a_folder_of_the_same_name_is_never_taken_for_the_built_in_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(builtin.WEIGHTS / "student", tmp_path / "mini" / "student")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match="a built-in model and a folder here"):
        find("mini/student")
    assert find("./mini/student").path == Path("mini/student")
    assert find("mini/teacher").path == builtin.WEIGHTS / "teacher"
