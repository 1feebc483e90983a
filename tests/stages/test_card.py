"""The model card: what the hub reads of it, what it tells, and what it must not."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from huggingface_hub import ModelCard
from tiny import Make, settings

from qatbench import cli, store
from qatbench.errors import ArtifactError, UsageError
from qatbench.stages import card, card_scores, export
from qatbench.stages.card import README, front_matter, render, rewrite
from qatbench.stages.common import silent
from qatbench.stages.evaluate import EvalSettings, evaluate
from qatbench.stages.quantize import quantize
from qatbench.stages.train import TrainRequest, train
from qatbench.stages.train_settings import TrainSettings
from qatbench.tasks import selector
from qatbench.tasks.sources import Source
from qatbench.vlm.load import ModelFolder, find, load

QUESTIONS = ("Which animal", "What color", "a mammal", tiny.SECRET_HINT)


def read(folder: Path) -> tuple[dict[str, Any], str]:
    """Metadata as the hub's own client reads it, and the page."""
    made = ModelCard((folder / README).read_text(encoding="utf-8"))
    return made.data.to_dict(), made.text


def section(page: str, title: str) -> str:
    return page.split(f"## {title}\n")[1].split("\n## ")[0]


# --- what every checkpoint says -----------------------------------------------------------------

CASES = [("text", "rtn", 4), ("text", "gptq", 4), ("llava", "awq", 4), ("llava", "awq", 3)]


@pytest.mark.parametrize(("family", "method", "bits"), CASES)
def test_a_packed_checkpoint_has_a_card(family: str, method: str, bits: int, make: Make) -> None:
    made = make(family, method, bits)
    data, page = read(made.path)
    layout = made.record["figures"]["layout"]
    assert data["library_name"] == "transformers"
    vlm = family == "llava"
    assert data["pipeline_tag"] == ("image-text-to-text" if vlm else "text-generation")
    kind = "awq" if layout == "awq" else "gptq"
    assert data["tags"] == list(dict.fromkeys(["qatbench", method, kind, f"{bits}-bit"]))
    assert "base_model" not in data  # a folder of this machine is no name on the hub
    assert "license" not in data
    assert "not stated" in page

    reload = made.record["figures"]["reload"]
    proof = section(page, "Proof of the export")
    assert f"bound {reload['bound']}" in proof
    assert f"text prompt {reload['text']}" in proof
    assert (f"image prompt {reload.get('image')}" in proof) == vlm
    weights = section(page, "Weights")
    assert f"have {bits} bits, one scale for {tiny.GROUP} weights" in weights
    assert ("symmetric" in weights) == (method != "awq")
    assert str(made.record["figures"]["bits_per_weight"]) in weights
    told = section(page, "Data")
    part = "scienceqa:train:text" if family == "text" else "scienceqa:train"
    sampled = f"- {part}: {tiny.SAMPLES} samples (local files)"
    assert told.strip() == (sampled if method != "rtn" else "No data were used.")
    assert ("| seed | 0 |" in section(page, "Method")) == (method != "rtn")
    assert f"gptqmodel {made.record['versions']['gptqmodel']}" in section(page, "Versions")
    vllm = "vllm serve" in section(page, "How to load it")
    assert vllm == (bits == 4)
    auto = "AutoModelForImageTextToText" if vlm else "AutoModelForCausalLM"
    assert f"import {auto}" in page


@pytest.mark.parametrize(("family", "method", "bits"), CASES)
def test_no_path_and_no_question_is_on_it(
    family: str, method: str, bits: int, make: Make, data: dict[str, str],
    models: dict[str, ModelFolder],
) -> None:  # fmt: skip
    made = make(family, method, bits)
    text = (made.path / README).read_text(encoding="utf-8")
    folders = [made.path, models[family].path, Path(data["scienceqa"]), Path.home(), Path.cwd()]
    assert not [str(f) for f in folders if str(f) in text or str(f.parent) in text]
    assert not [words for words in QUESTIONS if words in text]


@pytest.mark.parametrize(
    ("quant_method", "bits", "symmetric", "loads"),
    [
        ("gptq", 4, True, True), ("gptq", 8, True, True), ("awq", 4, False, True),
        ("gptq", 8, False, False), ("gptq", 3, True, False), ("gptq", 2, False, False),
    ],
)  # fmt: skip
def test_vllm_is_named_only_where_it_loads(
    quant_method: str, bits: int, symmetric: bool, loads: bool
) -> None:
    chosen = {"quant_method": quant_method, "bits": bits, "group_size": -1, "sym": symmetric}
    grid = card._grid(chosen)
    assert (grid["vllm"] == "") == loads
    assert grid["short"] == [f"w{bits}", "rows"]


def test_a_16_bit_checkpoint_is_a_finetune(models: dict[str, ModelFolder], tmp_path: Path) -> None:
    source = dataclasses.replace(models["text"], name="owner/base")
    loaded = load(models["text"], device="cpu", dtype=torch.float32)
    export.write_dense(
        source, loaded, tmp_path, {"method": "sft", "origin": card.origin(source, [])}
    )
    data, page = read(tmp_path)
    assert (data["base_model"], data["base_model_relation"]) == ("owner/base", "finetune")
    assert data["tags"] == ["qatbench", "sft"]
    assert "All weights are bfloat16" in page
    assert "vllm serve" in page
    assert "gptqmodel" not in section(page, "How to load it")


def test_a_trained_checkpoint_tells_settings_teacher_and_data(
    models: dict[str, ModelFolder], data: dict[str, str], tmp_path: Path
) -> None:
    chosen = TrainSettings(
        method="grace", steps=1, group_size=tiny.GROUP, batch_size=2, micro_batch_size=2, seed=7
    )
    rows = selector.load(selector.parse("scienceqa:train:text"), data)
    sources = [Source("scienceqa:train:text", rows), Source("more.json", rows[:3])]
    request = TrainRequest(
        chosen, models["text"], models["text"], sources, "cpu",
        places={"scienceqa": "derek-thomas/ScienceQA"}, leakage=("Leakage: scienceqa/9",),
    )  # fmt: skip
    record = train(request, tmp_path / "out", resume=False, progress=silent)
    head, page = read(tmp_path / "out")
    assert head["tags"] == ["qatbench", "grace", "gptq", "4-bit"]
    assert head["datasets"] == ["derek-thomas/ScienceQA"]
    method = section(page, "Method")
    assert "| teacher | text |" in method
    assert "| seed | 7 |" in method
    assert "| distillation.temperature | 2.0 |" in method
    assert record["spec"]["data"] not in page  # fingerprints are for provenance.json
    told = section(page, "Data")
    assert "- scienceqa:train:text: 6 samples (derek-thomas/ScienceQA), weight 1.0\n" in told
    assert "- more.json: 3 samples, weight 1.0\n" in told
    assert "- Leakage: scienceqa/9" in told
    assert render(find(str(tmp_path / "out"))) == (tmp_path / "out" / README).read_text()


# --- the base -----------------------------------------------------------------------------------


def based_on(models: dict[str, ModelFolder], folder: Path, readme: str | None) -> ModelFolder:
    shutil.copytree(models["text"].path, folder, dirs_exist_ok=True)
    if readme is not None:
        (folder / README).write_text(readme, encoding="utf-8", newline="")
    return find(str(folder))


@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_the_license_is_that_of_the_base(
    end: str, models: dict[str, ModelFolder], tmp_path: Path
) -> None:
    lines = ["---", "license: other", "license_name: llama2", "license_link: LICENSE.txt",
             "base_model: someone/else", "---", "# A model", ""]  # fmt: skip
    source = based_on(models, tmp_path, end.join(lines))
    told = card.origin(source, None)
    assert told["license"] == {
        "license": "other", "license_name": "llama2", "license_link": "LICENSE.txt",
    }  # fmt: skip
    assert told["base_model"] is None  # that is what the base was made from


@pytest.mark.parametrize(
    "readme",
    [None, "", "# no metadata", "---\nlicense: [a, b]\n---\n", "---\n: :\n- x\n---\n", "---\n"],
)
def test_a_base_without_a_license_says_so(
    readme: str | None, models: dict[str, ModelFolder], tmp_path: Path
) -> None:
    assert card.origin(based_on(models, tmp_path, readme), None)["license"] == {}


def test_built_in_models_and_hub_ids_are_named(models: dict[str, ModelFolder]) -> None:
    def told(name: str) -> dict[str, Any]:
        return card.origin(dataclasses.replace(models["text"], name=name), None)

    assert told("smollm2-135m")["base_model"] == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert told("mini/student")["base_model"] is None  # two parts, but not on the hub
    assert told("mini/student")["base"] == "mini/student"
    assert told("mini/student")["license"] == {"license": "apache-2.0"}
    assert told("Qwen/Qwen2-VL-2B-Instruct")["base_model"] == "Qwen/Qwen2-VL-2B-Instruct"
    assert told("/home/someone/models/mine")["base"] == "mine"


def test_what_is_made_of_a_checkpoint_names_the_base_of_that(
    models: dict[str, ModelFolder], tmp_path: Path
) -> None:
    head = "---\nbase_model: owner/base\nlicense: mit\n---\n"
    made = based_on(models, tmp_path, head)
    figures = {"method": "sft", "origin": {"base": "owner/base"}}
    record = {"stage": "train", "fingerprint": "x", "figures": figures}
    made = dataclasses.replace(made, provenance=record)
    told = card.origin(made, None, teacher=made)
    assert (told["base_model"], told["license"]) == ("owner/base", {"license": "mit"})
    assert told["base"] == told["teacher"] == "owner/base-sft"  # not the folder's name, "seed-0"


# --- nothing else changes -----------------------------------------------------------------------


def test_the_card_changes_no_fingerprint_and_no_resume(
    make: Make, models: dict[str, ModelFolder], data: dict[str, str], tmp_path: Path
) -> None:
    shutil.copytree(make("text", "gptq", 4).path, tmp_path / "out")
    known = find(str(tmp_path / "out"))
    foreign = dataclasses.replace(known, provenance={})  # by its bytes
    before = [folder.fingerprint() for folder in (known, foreign)]
    (tmp_path / "out" / README).write_text("something else")
    assert [folder.fingerprint() for folder in (known, foreign)] == before

    again = quantize(
        models["text"], settings("text", "gptq"), data, tmp_path / "out", resume=True,
        progress=silent,
    )  # fmt: skip
    assert again["fingerprint"] == before[0]
    assert (tmp_path / "out" / README).read_text() == "something else"


def test_a_folder_whose_card_fails_does_not_look_complete(
    models: dict[str, ModelFolder], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*args: object) -> None:
        raise OSError("no space left on device")

    loaded = load(models["text"], device="cpu", dtype=torch.float32)
    monkeypatch.setattr(card, "render", fails)
    with pytest.raises(OSError, match="no space"):
        export.write_dense(models["text"], loaded, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_config_json_is_the_last_file(
    models: dict[str, ModelFolder], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    published: list[str] = []
    replace = Path.replace

    def note(self: Path, target: Path) -> Path:
        published.append(self.name)
        return replace(self, target)

    loaded = load(models["text"], device="cpu", dtype=torch.float32)
    monkeypatch.setattr(Path, "replace", note)
    export.write_dense(models["text"], loaded, tmp_path)
    assert published[-1] == "config.json"
    assert README in published


# --- scores -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def scored(
    make: Make, data: dict[str, str], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Path]:
    """A checkpoint and an evaluation of it."""
    root = tmp_path_factory.mktemp("scored")
    shutil.copytree(make("text", "gptq", 4).path, root / "checkpoint")
    asked = EvalSettings(
        (selector.parse("scienceqa:test:text"),), {"scienceqa": "qatbench"}, limit=4, device="cpu"
    )
    evaluate(
        find(str(root / "checkpoint")), asked, data, root / "run", resume=False, progress=silent
    )
    return root / "checkpoint", root / "run"


def test_scores_are_on_the_card_as_the_hub_reads_them(scored: tuple[Path, Path]) -> None:
    folder, run = scored
    [row] = rewrite(find(str(folder)), [run])
    measured = store.read_json(run / "metrics.json")["tasks"][0]["overall"]
    made = ModelCard((folder / README).read_text(encoding="utf-8"))
    [found] = made.data.eval_results
    assert made.data.model_name == "text-gptq-w4-g32"
    assert found.metric_type == "accuracy"
    assert found.metric_value == round(100 * measured["accuracy"], 2) == row["accuracy"]
    low, high = (round(100 * measured[key], 2) for key in ("low", "high"))
    told = f"accuracy %, protocol qatbench, options, n = 4, 95 % [{low}, {high}]"
    assert found.metric_name == told
    assert (found.metric_args["n"], found.metric_args["limit"]) == (4, 4)
    assert (found.dataset_type, found.dataset_split) == ("scienceqa", "scienceqa:test:text")
    assert f"| scienceqa:test:text (local files) | qatbench, options | 4 | {row['accuracy']} |" in (
        section(made.text, "Scores")
    )
    assert "None were measured" not in made.text

    rewrite(find(str(folder)), [])
    assert "model-index" not in front_matter(folder)


def test_a_hub_id_and_the_drawn_benchmark_are_told_apart() -> None:
    row = {
        "task": "scienceqa", "parts": ["scienceqa:test"], "protocol": "qatbench", "mode": "options",
        "images": "none", "limit": None, "kernel": "Linear", "dtype": "float32", "n": 10,
        "accuracy": 50.0, "low": 23.66, "high": 76.34, "chance": 25.0, "unparsed": 0, "errors": 0,
    }  # fmt: skip
    hub = card_scores.result(row | {"place": "derek-thomas/ScienceQA"})
    assert hub["dataset"]["type"] == "derek-thomas/ScienceQA"
    drawn = card_scores.result(row | {"place": "mini"})["dataset"]
    assert (drawn["type"], drawn["name"]) == ("scienceqa", "scienceqa (mini, drawn by qatbench)")
    older = card_scores.result(row | {"place": None})
    assert older["dataset"]["type"] == "scienceqa"
    assert "limit" not in older["metrics"][0]["args"]
    assert older["metrics"][0]["args"]["images"] == "none"


def test_a_run_of_another_model_is_refused(
    scored: tuple[Path, Path], make: Make, tmp_path: Path
) -> None:
    folder, run = scored
    other = find(str(make("text", "rtn", 4).path))
    before = (other.path / README).read_bytes()
    with pytest.raises(ArtifactError, match="answers of another model"):
        rewrite(other, [run])
    assert (other.path / README).read_bytes() == before
    with pytest.raises(ArtifactError, match="another model"):
        rewrite(find(str(folder)), [_as_run(other, tmp_path)])


def _as_run(checkpoint: ModelFolder, folder: Path) -> Path:
    """A folder whose provenance is that of a checkpoint."""
    shutil.copyfile(checkpoint.path / store.PROVENANCE, folder / store.PROVENANCE)
    (folder / "metrics.json").write_text("{}")
    return folder


def test_an_unfinished_or_damaged_run_is_refused(scored: tuple[Path, Path], tmp_path: Path) -> None:
    folder, run = scored
    with pytest.raises(ArtifactError, match="no finished evaluation"):
        rewrite(find(str(folder)), [tmp_path])
    shutil.copytree(run, tmp_path / "run")
    (tmp_path / "run" / "metrics.json").write_text('{"tasks": 3}')
    with pytest.raises(ArtifactError, match="damaged metrics"):
        rewrite(find(str(folder)), [tmp_path / "run"])


def test_only_our_own_cards_are_rewritten(
    scored: tuple[Path, Path], models: dict[str, ModelFolder], tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match="no checkpoint that qatbench made"):
        rewrite(models["text"], [])
    assert not (models["text"].path / README).exists()
    shutil.copytree(scored[0], tmp_path / "mine")
    (tmp_path / "mine" / README).write_text("# My own words")
    with pytest.raises(UsageError, match="written by someone else"):
        rewrite(find(str(tmp_path / "mine")), [])
    assert (tmp_path / "mine" / README).read_text() == "# My own words"


def test_a_checkpoint_made_before_there_were_cards_gets_one(
    scored: tuple[Path, Path], tmp_path: Path
) -> None:
    shutil.copytree(scored[0], tmp_path / "old")
    (tmp_path / "old" / README).unlink()
    record = store.read_json(tmp_path / "old" / store.PROVENANCE)
    del record["figures"]["origin"]
    record["inputs"]["model"]["name"] = "smollm2-135m"
    store.write_json(tmp_path / "old" / store.PROVENANCE, record)
    rewrite(find(str(tmp_path / "old")), [])
    data, page = read(tmp_path / "old")
    assert data["base_model"] == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert "from `smollm2-135m`, which comes from [HuggingFaceTB" in page
    assert "Not on record." in section(page, "Data")


def test_the_verb(scored: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    folder, run = scored

    def ended(*arguments: object) -> tuple[Any, str, str]:
        with pytest.raises(SystemExit) as end:
            cli.main(["card", *map(str, arguments)])
        return end.value.code, *capsys.readouterr()

    code, out, err = ended(folder, run, "--json")
    assert (code, err) == (0, "")
    assert json.loads(out)["scores"][0]["n"] == 4
    assert "model-index" in front_matter(folder)
    code, out, _ = ended(folder, run)
    assert code == 0
    assert "qatbench" in out
    assert str(folder) not in (folder / README).read_text()
    assert ended("not-there")[0] == 2
    assert ended(folder, folder)[0] == 4
