"""verify: planted defects are found, each by its own rule, and repaired where that is possible."""

from __future__ import annotations

import gc
import json
import pickle
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from safetensors.torch import load_file
from torch import Tensor
from verify_cases import (
    AWQ,
    CT,
    GPTQ,
    NOT,
    NOTES,
    SHARED,
    SHORT,
    WEIGHTS,
    Case,
    Plant,
    awq_at,
    both,
    compressed,
    config,
    each,
    gone,
    renamed,
    says,
    settings_beside,
    shards,
    silent_on,
    tensors,
    whole_rows,
    without,
)

from qatbench import cli
from qatbench.errors import ArtifactError, PrerequisiteError, QatbenchError, UsageError
from qatbench.stages import quantize as stage
from qatbench.stages.common import silent
from qatbench.stages.proof import RELOAD_BOUND, probe
from qatbench.stages.verify import loaders, verify
from qatbench.stages.verify.finding import few, found
from qatbench.stages.verify.reload import reload
from qatbench.stages.verify.repair import REPAIRS, repair
from qatbench.stages.verify.rules import RULES, SLOW
from qatbench.stages.verify.subject import subject
from qatbench.vlm.load import Loaded as LoadedModel
from qatbench.vlm.load import ModelFolder, _load_plain, find, load_tokenizer

VLMS = ["llava", *tiny.QWEN_VLMS]
PLANTED = [*AWQ, *GPTQ, *SHARED]
Sound = Callable[..., Path]
Logits = dict[str, Tensor]


@pytest.fixture(scope="module", autouse=True)
def _short_collections() -> Iterator[None]:
    """The library collects garbage at every load: leave out what is there already."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(scope="session")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Sound:
    """A sound checkpoint, made once: `sound("qwen2_vl-awq")`; `-tied`: GPTQ with a tied head."""
    root = tmp_path_factory.mktemp("sound")

    def make(name: str, bits: int = 4, group: int = tiny.GROUP) -> Path:
        family, _, form = name.partition("-")
        out = root / f"{name}-{bits}-{group}"
        if out.exists():
            return out
        how = {"tied": True} if form == "tied" else {}
        source = root / f"source-{family}-{form == 'tied'}"
        if not source.exists():
            tiny.SAVE[family](source, **how)
        layout = "awq" if form == "awq" else "gptq"
        chosen = replace(tiny.settings("text", "rtn", bits), group_size=group, layout=layout)
        stage.quantize(find(str(source)), chosen, {}, out, resume=False, progress=silent)
        return out

    return make


def copied(folder: Path, plant: Plant, out: Path) -> Path:
    shutil.copytree(folder, out)
    plant(out)
    return out


def rules_of(folder: Path, *, load: bool = False) -> set[str]:
    return {finding.rule for finding in verify(folder, load=load).defects}


def answers(folder: Path, *, whole: bool = False) -> Logits | None:
    """Logits under plain transformers, None when it raises; `whole`: no key may be missing."""
    config = json.loads((folder / "config.json").read_text())
    at = ModelFolder(str(folder), folder, config, {})
    try:
        model, info = _load_plain(at, torch.float32, "cpu")
        assert not whole or not any(info.values()), info
        return probe(LoadedModel(at, model.eval(), *load_tokenizer(at), "library"))
    except AssertionError:
        raise
    except Exception:  # noqa: BLE001 - that it fails is what is asked
        return None


@pytest.fixture(scope="session")
def right(sound: Sound) -> Callable[[str], Logits]:
    """The answers of a sound checkpoint, asked once."""
    known: dict[str, Logits] = {}

    def of(name: str) -> Logits:
        if name not in known:
            known[name] = answers(sound(name)) or {}
        return known[name]

    return of


def off(got: Logits, wanted: Logits) -> float:
    """Largest difference of a logit as a share of the logits' spread; inf for NaN."""
    apart = [((got[k] - wanted[k]).abs().max() / wanted[k].std()).item() for k in wanted]
    return max(float("inf") if value != value else value for value in apart)


def identical(folder: Path, other: Path) -> bool:
    """Whether two checkpoints hold one config and the same tensors in one file."""
    configs = [json.loads((path / "config.json").read_text()) for path in (folder, other)]
    if configs[0] != configs[1] or not (folder / WEIGHTS).exists():
        return False
    held, wanted = (load_file(path / WEIGHTS) for path in (folder, other))
    return held.keys() == wanted.keys() and all(torch.equal(held[k], wanted[k]) for k in held)


# --- what is sound ------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["gptq", "awq"])
@pytest.mark.parametrize("family", ["text", *VLMS])
def test_sound_checkpoints_of_every_family_and_format(family: str, form: str, sound: Sound) -> None:
    verdict = verify(sound(f"{family}-{form}"))
    fp16 = {"awq-fp16"} if form == "awq" and family in ("qwen2_vl", "qwen2_5_vl") else set()
    assert {finding.rule for finding in verdict.findings} == fp16
    assert verdict.exit_code == 0
    assert verdict.loader("transformers") == "loads right"
    assert verdict.reload is not None
    kinds = ["text"] if family == "text" else ["text", "image"]
    assert verdict.reload["finite"] == dict.fromkeys(kinds, True)
    assert (verdict.recorded or {}).keys() >= set(kinds)


@pytest.mark.parametrize("bits", [2, 3, 8])
def test_narrow_widths_are_a_note(bits: int, sound: Sound) -> None:
    verdict = verify(sound("llava-gptq", bits))
    narrow = bits < 4
    assert {finding.rule for finding in verdict.findings} == ({"plain-only"} if narrow else set())
    assert verdict.exit_code == 0
    assert (verdict.loader("vllm") == "refuses this width") == narrow


@pytest.mark.parametrize("bits", [3, 8])
def test_awq_at_other_widths_is_for_transformers_alone(
    bits: int, sound: Sound, right: Callable[[str], Logits], tmp_path: Path
) -> None:
    folder = copied(sound("llava-awq"), awq_at(bits), tmp_path / "wide")
    verdict = verify(folder)
    assert [finding.rule for finding in verdict.findings] == ["plain-only"]
    assert (verdict.exit_code, verdict.loader("vllm")) == (0, "refuses this width")
    if bits == 8:  # so near the 4-bit values that it was made from
        assert off(answers(folder, whole=True) or {}, right("llava-awq")) < 10 * RELOAD_BOUND
    says(**{NOT: ["model.vision_tower", "model.multi_modal_projector"]})(folder)
    assert rules_of(folder) == set()  # only vLLM minds
    says(**{NOT: ["vision_tower", "multi_modal_projector"]})(folder)
    assert rules_of(folder) == {"awq-skip-transformers"}


def test_group_sizes_that_vllm_has_no_kernel_for(sound: Sound) -> None:
    assert rules_of(sound("llava-gptq", 4, 16), load=True) == {"gptq-group-size"}
    assert rules_of(sound("llava-awq", 4, 16), load=True) == set()
    assert rules_of(sound("llava-gptq", 3, 16)) == set()  # vLLM refuses the width anyway


def test_whole_rows_are_told_from_groups(sound: Sound, tmp_path: Path) -> None:
    rows = copied(sound("llava-gptq"), tensors(whole_rows), tmp_path / "rows")
    assert rules_of(rows) == {"group-differs"}
    says(group_size=-1)(rows)
    assert rules_of(rows) == set()
    says(desc_act=True)(rows)
    assert rules_of(rows) == set()  # one group a row has no order


def test_sixteen_bit_models_are_verified_too(sound: Sound) -> None:
    sound("qwen2_vl-gptq")
    verdict = verify(sound("qwen2_vl-gptq").parent / "source-qwen2_vl-False")
    assert (verdict.method, verdict.findings, verdict.exit_code) == (None, (), 0)


@pytest.mark.parametrize(("name", "base", "plant", "rules"), NOTES, ids=[row[0] for row in NOTES])
def test_what_both_loaders_take_is_no_defect(
    name: str,
    base: str,
    plant: Plant,
    rules: set[str],
    sound: Sound,
    right: Callable[[str], Logits],
    tmp_path: Path,
) -> None:
    folder = copied(sound(base), plant, tmp_path / "planted")
    verdict = verify(folder, load=False)
    assert {finding.rule for finding in verdict.findings} - {"awq-fp16"} == rules - {"awq-fp16"}
    assert verdict.exit_code == 0
    got = answers(folder)
    assert got is not None
    assert off(got, right(base)) < RELOAD_BOUND


# --- what is not --------------------------------------------------------------------------------


@pytest.mark.parametrize("case", [*PLANTED, *CT], ids=lambda case: case.name)
def test_a_planted_defect_is_found_by_its_own_rule_and_does_what_it_says(
    case: Case, sound: Sound, right: Callable[[str], Logits], tmp_path: Path
) -> None:
    folder = copied(sound(case.base), case.plant, tmp_path / "planted")
    verdict = verify(folder, load=False)
    assert {finding.rule for finding in verdict.defects} == case.rules
    assert (verdict.exit_code, verdict.repairable) == (1, case.repairable)
    for finding in verdict.defects:
        assert finding.where
        assert RULES[finding.rule].fix == finding.fix
    broken = {name for name in ("transformers", "vllm") if verdict.loader(name) == "breaks"}
    assert broken
    if case in CT or case.name == "no image token":  # our own encoder stops at the latter
        return
    effects = {f.transformers for f in verdict.defects if f.breaks("transformers")}
    got, wanted = answers(folder), right(case.base)
    if not effects:
        assert got is not None
        assert off(got, wanted) < RELOAD_BOUND or case.name in OTHERWISE
    elif got is not None:
        assert off(got, wanted) > 10 * RELOAD_BOUND
        if effects == {"NaN on images"}:
            assert off({"text": got["text"]}, {"text": wanted["text"]}) < RELOAD_BOUND
            assert not torch.isfinite(got["image"]).all()


# Of these transformers makes what the tensors say, which is not what the sound checkpoint said.
OTHERWISE = ("act order", "asymmetric", "zeros off the middle", "another head than the tied one")


@pytest.mark.parametrize("case", [c for c in PLANTED if c.repairable], ids=lambda case: case.name)
def test_a_repaired_copy_verifies_and_answers_as_before(
    case: Case, sound: Sound, right: Callable[[str], Logits], tmp_path: Path
) -> None:
    folder = copied(sound(case.base), case.plant, tmp_path / "planted")
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    done, verdict = repair(folder, tmp_path / "copy", load=False)
    assert set(done) == case.rules
    assert (verdict.path, verdict.exit_code) == (tmp_path / "copy", 0)
    if not identical(verdict.path, sound(case.base)):
        wanted = right(case.base)
        if case.alike is not None:
            wanted = answers(copied(sound(case.base), case.alike, tmp_path / "alike")) or {}
        got = answers(verdict.path, whole=True)
        assert got is not None
        assert off(got, wanted) < case.within
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before
    assert not list(tmp_path.glob(".copy*"))
    assert not (verdict.path / "provenance.json").exists()  # it is no longer what the stage made


@pytest.mark.parametrize(
    "case", [c for c in PLANTED if not c.repairable], ids=lambda case: case.name
)
def test_what_is_beyond_repair_is_not_written(case: Case, sound: Sound, tmp_path: Path) -> None:
    folder = copied(sound(case.base), case.plant, tmp_path / "planted")
    done, verdict = repair(folder, tmp_path / "copy")
    assert (done, verdict.exit_code, verdict.repairable) == ([], 1, False)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["planted"]


@pytest.mark.parametrize("case", [c for c in CT if c.repairable], ids=lambda case: case.name)
def test_compressed_tensors_are_repaired_by_the_rules(
    case: Case, sound: Sound, tmp_path: Path
) -> None:
    folder = copied(sound(case.base), case.plant, tmp_path / "planted")
    done, verdict = repair(folder, tmp_path / "copy", load=False)
    assert set(done) == case.rules
    assert {finding.rule for finding in verdict.findings} == {"ct-slow"}
    kept, copy = (load_file(path / WEIGHTS) for path in (folder, verdict.path))
    assert kept.keys() == copy.keys()
    assert all(torch.equal(kept[key], copy[key]) for key in kept)


def test_several_defects_are_repaired_in_one_copy_some_after_others(
    sound: Sound, right: Callable[[str], Logits], tmp_path: Path
) -> None:
    """Without settings nothing can be said of the label; it is found once they are there."""

    def plant(folder: Path) -> None:
        says(checkpoint_format="gptq_v2", desc_act=True)(folder)
        settings_beside(folder)
        shards(lambda *_: None, named=False)(folder)

    folder = copied(sound("qwen3_vl-gptq"), plant, tmp_path / "planted")
    assert rules_of(folder) == {"weights-name", "no-quantization-config"}
    done, verdict = repair(folder, tmp_path / "copy")
    assert done == ["weights-name", "no-quantization-config", "gptq-label", "gptq-desc-act"]
    assert verdict.exit_code == 0
    assert verdict.reload is not None
    assert off(answers(verdict.path, whole=True) or {}, right("qwen3_vl-gptq")) < 1e-5
    assert len(list(verdict.path.glob("model-*.safetensors"))) == 2


def test_one_defect_beyond_repair_leaves_the_others_unwritten(sound: Sound, tmp_path: Path) -> None:
    def plant(folder: Path) -> None:
        says(checkpoint_format="gptq_v2")(folder)
        gone("processor_config.json")(folder)

    folder = copied(sound("llava-gptq"), plant, tmp_path / "planted")
    done, verdict = repair(folder, tmp_path / "copy")
    assert (done, [f.rule for f in verdict.defects]) == ([], ["no-processor", "gptq-label"])
    assert not (tmp_path / "copy").exists()


# --- the reload ---------------------------------------------------------------------------------


def test_the_reload_finds_what_no_rule_knows(sound: Sound, tmp_path: Path) -> None:
    folder = copied(sound("qwen2_vl-gptq"), says(damp_percent=0.0), tmp_path / "planted")
    assert rules_of(folder) == set()
    verdict = verify(folder)
    assert [finding.rule for finding in verdict.defects] == ["reload-fails"]
    assert "damp_percent" in verdict.defects[0].what
    assert (verdict.exit_code, verdict.repairable, verdict.reload) == (1, False, None)


def test_the_reload_fails_on_missing_keys_and_on_nan(sound: Sound, tmp_path: Path) -> None:
    no_list = copied(sound("qwen2_vl-awq"), silent_on(NOT), tmp_path / "list")
    findings, record = reload(subject(no_list))
    assert [finding.rule for finding in findings] == ["reload-fails"]
    assert "30 missing keys" in findings[0].what
    assert record is None
    told = [finding.rule for finding in verify(no_list).findings if finding.defect]
    assert told == ["awq-skip-transformers"]  # what is known to break is not loaded
    large = each("model.norm.weight", lambda w: torch.full_like(w, 3e38))
    overflow = copied(sound("qwen2_vl-gptq"), large, tmp_path / "large")
    assert [finding.rule for finding in verify(overflow).findings] == ["reload-nan"]


def test_a_reload_that_cannot_be_done_is_a_note(
    sound: Sound, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = copied(sound("llava-gptq"), gone("chat_template.jinja"), tmp_path / "silent")
    verdict = verify(folder)
    assert [finding.rule for finding in verdict.findings] == ["no-chat-template", "not-reloaded"]
    assert (verdict.exit_code, verdict.loader("transformers")) == (0, "loads right, by its rules")

    def small(*args: object, **kwargs: object) -> None:
        raise RuntimeError("not enough memory: you tried to allocate 1 bytes")

    monkeypatch.setattr("qatbench.vlm.load._load_plain", small)
    assert [f.rule for f in verify(sound("llava-gptq")).findings] == ["not-reloaded"]


# --- vLLM's and transformers' matching, as measured ---------------------------------------------

# Loading notes: list -> (transformers right, vLLM right), for the Qwen VLMs and LLaVA alike.
LISTS = {
    ("{0}",): (False, True),
    ("model.{0}",): (True, False),
    ("{0}", "model.{0}"): (True, True),
    ("model.{0}.",): (True, True),
    (".*{0}.*",): (True, False),
}


@pytest.mark.parametrize("entries", LISTS)
@pytest.mark.parametrize("family", VLMS)
def test_skip_lists_match_as_each_loader_matches_them(
    family: str, entries: tuple[str, ...], sound: Sound
) -> None:
    checked = subject(sound(f"{family}-awq"))
    arch, names = checked.arch, list(checked.skeleton.linears)
    parts = ("vision_tower", "multi_modal_projector") if family == "llava" else ("visual",)
    skip = [entry.format(part) for part in parts for entry in entries]
    wanted = set(checked.packed)
    plain = loaders.transformers_awq(names, skip) == wanted
    vllm = loaders.vllm_awq(arch, names, skip, head=False) == wanted
    assert (plain, vllm) == LISTS[entries]


def test_a_head_that_the_config_calls_packed_is_taken_for_packed_by_vllm(sound: Sound) -> None:
    checked = subject(sound("llava-awq"))
    arch, names = checked.arch, list(checked.skeleton.linears)
    assert "lm_head" in loaders.vllm_awq(arch, names, ["vision"], head=True)
    assert "lm_head" not in loaders.vllm_awq(arch, names, ["vision", "lm_head"], head=True)
    assert "lm_head" not in loaders.vllm_awq(arch, names, ["vision"], head=False)


@pytest.mark.parametrize(
    ("family", "hit"),
    [("llava", 6), ("qwen2_vl", 0), ("qwen2_5_vl", 6), ("qwen3_vl", 0)],
)
def test_short_names_match_vision_parts_of_some_families(
    family: str, hit: int, sound: Sound
) -> None:
    """Loading notes: CLIP's attention (q, k, v of 2 layers), Qwen2.5-VL's vision MLP."""
    checked = subject(sound(f"{family}-gptq"))
    short = loaders.flat(SHORT)
    names = list(checked.skeleton.linears)
    taken = loaders.vllm_gptq(checked.arch, names, short, head=False)
    assert taken >= set(checked.packed)
    assert len(taken - set(checked.packed)) == hit
    assert loaders.transformers_gptq(names, checked.arch.layers, short) == set(checked.packed)


def test_boundaries_and_bad_regexes() -> None:
    names = ["a.layer.1.fc", "a.layer.11.fc", "a.layer.1x.fc"]
    assert loaders.transformers_awq(names, ["a.layer.1"]) == set(names[1:])
    assert loaders.transformers_awq(names, ["11.fc"]) == {names[0], names[2]}
    assert loaders.transformers_awq(names, ["*("]) == set(names)
    assert loaders.transformers_ct(names, ["Linear"], ["re:("]) == set(names)
    assert loaders.fused_groups(["x.q_proj", "x.k_proj", "y.up_proj", "y.gate_proj"]) == [
        ["x.q_proj", "x.k_proj"],
        ["y.gate_proj", "y.up_proj"],
    ]


# --- folders that cannot be judged --------------------------------------------------------------


def torn(folder: Path) -> None:
    data = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(data[: len(data) // 2])


def pickled(folder: Path) -> None:
    (folder / WEIGHTS).rename(folder / "pytorch_model.bin")


def written(name: str, text: str) -> Plant:
    return lambda folder: (folder / name).write_text(text) and None


def outside(folder: Path) -> None:
    shards(lambda _, index: index["weight_map"].update(x="../other.safetensors"))(folder)


UNREADABLE: list[tuple[str, Plant, type[Exception], str]] = [
    ("torn weights", torn, ArtifactError, "is damaged"),
    ("broken config", written("config.json", "{"), ArtifactError, "cannot read"),
    ("a list as config", written("config.json", "[]"), ArtifactError, "JSON object"),
    ("pickles", pickled, ArtifactError, "pickled weights .* never opened"),
    ("broken index", both(shards(lambda *_: None), written("model.safetensors.index.json", "{")),
     ArtifactError, "cannot read"),
    ("an empty index", both(shards(lambda *_: None), written("model.safetensors.index.json", "{}")),
     ArtifactError, "no map of keys"),
    ("a file outside", outside, ArtifactError, "no map of keys"),
    ("no model", config(lambda c: c["text_config"].update(hidden_size="wide")), ArtifactError,
     "describes no llava model"),
    ("settings that are none", config(lambda c: c.update(quantization_config="gptq")),
     ArtifactError, "no object"),
    ("no config", gone("config.json"), PrerequisiteError, "no config.json"),
    ("no weights", gone(WEIGHTS), PrerequisiteError, "no safetensors"),
    ("a shard missing", shards(lambda f, _: (f / "model-00002-of-00002.safetensors").unlink()),
     PrerequisiteError, "names model-00002-of-00002.safetensors"),
    ("unfinished", both(gone("provenance.json"), written("unfinished.json", "{}")),
     PrerequisiteError, "unfinished"),
    ("another method", says(quant_method="fp8"), UsageError, "'fp8' is not covered"),
    ("another format", both(compressed, says(format="float-quantized")), UsageError, "not covered"),
    ("another family", config(lambda c: c.update(model_type="bert")), UsageError, "not supported"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "plant", "error", "words"), UNREADABLE, ids=[row[0] for row in UNREADABLE]
)
def test_what_cannot_be_read_is_refused_in_one_line(
    name: str, plant: Plant, error: type[QatbenchError], words: str, sound: Sound, tmp_path: Path
) -> None:
    folder = copied(sound("llava-gptq"), plant, tmp_path / "planted")
    with pytest.raises(error, match=words) as told:
        verify(folder)
    assert type(told.value) is error
    assert "\n" not in told.value.message
    assert told.value.hint


def test_nothing_of_a_checkpoint_is_executed(
    sound: Sound, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """auto_map, a kernel from the hub, and pickles beside sound weights."""
    code = "open('ran', 'w').close()\n"
    asks = {"AutoConfig": "evil.Config", "AutoModelForImageTextToText": "evil.Model"}

    def plant(folder: Path) -> None:
        (folder / "evil.py").write_text(code)
        (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Evil()))
        for name in ("config.json", "tokenizer_config.json", "processor_config.json"):
            value = json.loads((folder / name).read_text())
            (folder / name).write_text(json.dumps(value | {"auto_map": asks}))

    monkeypatch.chdir(tmp_path)
    folder = copied(sound("llava-gptq"), plant, tmp_path / "planted")
    verdict = verify(folder)
    assert not list(tmp_path.rglob("ran"))
    assert [finding.rule for finding in verdict.findings] == ["remote-code"]
    says(checkpoint_format="gptq_v2")(folder)
    _, copy = repair(folder, tmp_path / "copy")
    assert copy.exit_code == 0
    assert not {".py", ".bin"} & {file.suffix for file in copy.path.iterdir()}


class Evil:
    def __reduce__(self) -> tuple[Any, ...]:
        return (open, ("ran", "w"))


def test_a_copy_is_never_written_over_something(sound: Sound, tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    with pytest.raises(UsageError, match="exists already"):
        repair(sound("llava-gptq"), tmp_path / "there")


def test_a_repair_that_fails_leaves_nothing(
    sound: Sound, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plant = both(says(checkpoint_format="gptq_v2"), renamed("", "module."))
    folder = copied(sound("llava-gptq"), plant, tmp_path / "planted")

    def full(*args: object, **kwargs: object) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr("qatbench.stages.verify.draft.save_file", full)
    with pytest.raises(OSError, match="space"):
        repair(folder, tmp_path / "copy")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["planted"]


# --- the table ----------------------------------------------------------------------------------


def test_every_rule_is_planted_and_every_repair_has_its_rule() -> None:
    planted = {rule for case in [*PLANTED, *CT] for rule in case.rules}
    planted |= {rule for *_, rules in NOTES for rule in rules}
    elsewhere = {"plain-only", "gptq-group-size", "ct-slow", "no-chat-template"}
    elsewhere |= {"reload-fails", "reload-nan", "not-reloaded"}
    assert planted | elsewhere == RULES.keys()
    assert not planted & elsewhere
    assert REPAIRS.keys() == {rule for rule, row in RULES.items() if row.repair != "no"}
    notes = {rule for rule, row in RULES.items() if {row.transformers, row.vllm} <= {"", SLOW}}
    assert not notes & REPAIRS.keys()


def test_the_page_of_rules_is_the_table() -> None:
    page = (Path(__file__).parents[2] / "docs" / "verify.md").read_text(encoding="utf-8")
    rows = [line for line in page.splitlines() if line.startswith("| `")]
    repaired = {"yes": "yes", "no": "-", "if": "if the tensors tell"}
    assert rows == [
        f"| `{rule}` | {row.transformers or '-'} | {row.vllm or '-'} | {row.means} | {row.fix} "
        f"| {repaired[row.repair]} |"
        for rule, row in RULES.items()
    ]


def test_a_finding_counts_what_it_does_not_name() -> None:
    assert few(["a", "b", "c", "d"]) == "a, b and 2 more"
    assert few(["a"]) == "a"
    assert not found("plain-only", "x").defect
    assert not found("ct-slow", "x").defect  # slow is right
    assert found("gptq-sym", "x").breaks("vllm")


# --- the command --------------------------------------------------------------------------------


def called(capsys: pytest.CaptureFixture[str], *args: object) -> tuple[object, str, str]:
    with pytest.raises(SystemExit) as ended:
        cli.main(["verify", *map(str, args)])
    return ended.value.code, *capsys.readouterr()


def test_the_command_on_a_sound_checkpoint(
    sound: Sound, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, err = called(capsys, sound("qwen3_vl-gptq"))
    assert code == 0
    assert "loads right" in out
    assert f"next: qatbench eval {sound('qwen3_vl-gptq')}" in err
    assert "scienceqa:test:text" in called(capsys, sound("text-awq"), "--no-load")[2]
    code, out, _ = called(capsys, sound("qwen3_vl-gptq"), "--no-load", "--json")
    told = json.loads(out)
    assert code == 0
    assert (told["sound"], told["findings"], told["reload"]) == (True, [], None)
    assert (told["format"], told["bits"], told["group_size"]) == ("gptq", 4, tiny.GROUP)
    assert told["recorded"]["kernel"]


def test_the_command_repairs(
    sound: Sound, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = copied(sound("llava-awq"), silent_on(NOT), tmp_path / "planted")
    code, out, err = called(capsys, folder)
    assert code == 1
    for words in ("awq-skip-transformers", "NaN on images", "fix: list every part in both"):
        assert words in out
    assert f"next: qatbench verify {folder} --repair {folder}-repaired" in err
    code, out, err = called(capsys, folder, "--repair", tmp_path / "copy", "--json")
    told = json.loads(out)
    assert code == 0
    assert (told["sound"], told["repaired"]["sound"]) == (False, True)
    assert told["repaired"]["rules"] == ["awq-skip-transformers"]
    assert told["repaired"]["checkpoint"] == str(tmp_path / "copy")
    assert f"next: qatbench eval {tmp_path / 'copy'}" in err
    code, out, err = called(capsys, folder, "--repair", tmp_path / "copy")
    assert (code, out) == (2, "")
    assert err.startswith("error: ")


def test_the_command_says_what_is_beyond_repair(
    sound: Sound, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = copied(sound("llava-gptq"), without("vision_model.pre_layrnorm.weight"),
                    tmp_path / "planted")  # fmt: skip
    code, out, _ = called(capsys, folder, "--repair", tmp_path / "copy")
    assert code == 1
    assert f"no copy was written to {tmp_path / 'copy'}: beyond repair are vision-missing" in out
    assert not (tmp_path / "copy").exists()
    code, out, _ = called(capsys, sound("llava-gptq"), "--repair", tmp_path / "copy", "--no-load")
    assert (code, (tmp_path / "copy").exists()) == (0, False)
    assert "nothing to repair" in out


@pytest.mark.parametrize(("plant", "code"), [(gone(WEIGHTS), 3), (torn, 4), (pickled, 4)])
def test_the_command_ends_with_the_code_of_what_is_wrong(
    plant: Plant, code: int, sound: Sound, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = copied(sound("llava-gptq"), plant, tmp_path / "planted")
    assert called(capsys, folder)[0] == code
    assert called(capsys, tmp_path / "nowhere")[0] == 3
