"""compare --speed: arms are known by their models, and claims about speed get their verdicts."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from run_folders import pattern, predictions, write_run
from test_claims import BASE, GPTQ, GRACE, SFT, W4, task
from test_markdown import arm, comparison, pair

from qatbench import cli
from qatbench.errors import UsageError
from qatbench.records_speed import (
    Bandwidth,
    EvaluationRow,
    Speed,
    SpeedModel,
    SpeedRow,
    spread,
)
from qatbench.report import figures, pareto
from qatbench.report.details import Claim
from qatbench.report.html import render as render_html
from qatbench.report.markdown import render
from qatbench.report.model import ArmResult, Comparison
from qatbench.report.speed_arms import about, arm_speed_rows
from qatbench.report.speed_model import ArmSpeed, cases
from qatbench.report.tables import cost_rows
from qatbench.stages.claims import verdicts
from qatbench.stages.speeds import with_speed

SIZES = {"base": 14_000, "sft": 14_000, "gptq": 4_000, "grace": 4_000}


def row(model: str, decode: float, **changes: Any) -> SpeedRow:
    """A row whose repeats lie 2 % around `decode`."""
    rates = (0.98 * decode, decode, 1.02 * decode)
    given: dict[str, Any] = {
        "model": f"out/{model}",
        "fingerprint": f"f-{model}",
        "engine": "qatbench",
        "kernel": "marlin",
        "attention": "sdpa",
        "dtype": "bfloat16",
        "batch": 1,
        "context": 512,
        "images": 0,
        "status": "ok",
        "first_token_seconds": spread([0.05]),
        "prefill_tokens_per_second": spread([10_240.0]),
        "decode_tokens_per_second": spread(rates),
        "weight_bytes": SIZES.get(model, 4_000) * 10**6,
        "cache_bytes": 300 * 10**6,
        "peak_bytes": SIZES.get(model, 4_000) * 10**6 + 500 * 10**6,
        "moved_bytes": 13_500e6 if SIZES.get(model) == 14_000 else 3_700e6,
    }
    return SpeedRow(**(given | changes))


def measured(*rows: SpeedRow, **changes: Any) -> Speed:
    models = dict.fromkeys((one.model, one.fingerprint) for one in rows)
    given: dict[str, Any] = {
        "device": "cuda",
        "gpu": "NVIDIA H100",
        "cpu_threads": 8,
        "dtype": "bfloat16",
        "seed": 0,
        "warm_up": 1,
        "repeats": 3,
        "tokens": 64,
        "in_turns": True,
        "image": "none",
        "versions": {"torch": "2.11.0"},
        "bandwidth": Bandwidth(copied_bytes=10**9, bytes_per_second=spread([2.6e12])),
        "models": tuple(
            SpeedModel(
                model=name, fingerprint=print_, model_type="llama", bits=None, group_size=None,
                method=None, checkpoint_bytes=1,
            )
            for name, print_ in models
        ),
        "rows": rows,
    }  # fmt: skip
    return Speed(**(given | changes))


def known(one: ArmResult) -> ArmResult:
    return one.model_copy(update={"models": tuple(f"f-{one.name}" for _ in one.seeds)})


ARMS = tuple(known(one) for one in (BASE, SFT, GPTQ, GRACE))


def compared(*rows: SpeedRow, arms: tuple[ArmResult, ...] = ARMS, **changes: Any) -> Comparison:
    blocks = (task(arms=arms),)
    bare = Comparison(baseline="base", tasks=blocks, claims=verdicts(blocks, "base"))
    return with_speed(bare, measured(*rows, **changes))


def claim(name: str, told: Comparison) -> Claim:
    return {one.id: one for one in told.claims}[name]


def throughput(*rows: SpeedRow, **changes: Any) -> Claim:
    return claim("throughput", compared(*rows, **changes))


# --- whose speeds -------------------------------------------------------------------------------


def test_arms_are_known_by_their_model() -> None:
    told = compared(row("base", 155.0), row("grace", 281.0)).tasks[0]
    assert {arm.name: bool(arm.speed) for arm in told.arms} == {
        "base": True, "sft": False, "gptq": False, "grace": True,
    }  # fmt: skip
    speed = told.arm("grace").speed
    assert speed is not None
    assert (speed.on, speed.seed, len(speed.rows)) == ("NVIDIA H100", 0, 1)
    assert Comparison.model_validate_json(compared(row("base", 1.0)).model_dump_json())


def test_of_several_seeds_the_first_that_was_measured() -> None:
    seeds = arm("grace", (0.8, 0.82, 0.84), method="grace", models=("f-0", "f-1", "f-2"), **W4)
    rows = [row("grace", rate, fingerprint=f"f-{k}") for k, rate in ((2, 300.0), (1, 281.0))]
    speed = compared(*rows, arms=(ARMS[0], seeds)).tasks[0].arm("grace").speed
    assert speed is not None
    assert speed.seed == 1
    assert [one.fingerprint for one in speed.rows] == ["f-1"]


def test_a_measurement_of_other_models_is_refused() -> None:
    with pytest.raises(UsageError, match=r"none of the models .* out/other"):
        compared(row("other", 100.0))
    with pytest.raises(UsageError, match="older than speeds"):
        compared(row("base", 100.0), arms=(BASE, GRACE))


def test_another_measurement_takes_the_place_of_the_first() -> None:
    first = compared(row("base", 155.0), row("grace", 281.0))
    again = with_speed(first, measured(row("base", 99.0)))
    assert again.tasks[0].arm("grace").speed is None
    assert claim("throughput", again).verdict == "not testable here"


def test_questions_a_second_are_those_that_were_measured() -> None:
    asked = EvaluationRow(
        model="out/grace", fingerprint="f-grace", engine="transformers", kernel="marlin",
        dtype="bfloat16", task="scienceqa:test:text", protocol="qatbench", questions=200,
        padded_tokens=16384, status="ok", questions_per_second=spread([48.0, 49.0, 52.0]),
    )  # fmt: skip
    told = compared(row("base", 155.0), row("grace", 281.0), evaluations=(asked,)).tasks[0]
    assert told.arm("grace").questions_per_second == 49.0
    assert told.arm("base").questions_per_second is None
    other = asked.model_copy(update={"task": "mmbench"})
    told = compared(row("grace", 281.0), evaluations=(other,)).tasks[0]
    assert told.arm("grace").questions_per_second is None


# --- the claim about throughput -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("decode", "verdict"),
    [
        (281.0, "contradicted"),  # 1.81 x
        (500.0, "reproduced"),  # 3.23 x, at least 3.1
        (450.0, "undecided"),  # 2.90 x, repeats between 2.79 and 3.02
        (465.0, "undecided"),  # 3.00 x
    ],
)
def test_throughput_is_the_ratio_in_one_engine(decode: float, verdict: str) -> None:
    told = throughput(row("base", 155.0), row("grace", decode))
    assert told.verdict == verdict
    assert f"{decode / 155:.2f} x" in told.reason
    assert "on NVIDIA H100" in told.reason
    assert told.here == (
        f"`grace` {decode:.0f} tokens/s against `base` 155: {decode / 155:.2f} x (batch 1, context"
        " 512, engine qatbench, bfloat16, NVIDIA H100)"
    )


def test_the_engine_is_the_one_in_which_int4_is_fastest() -> None:
    plain = {"engine": "transformers"}
    rows = (row("base", 31.0, **plain), row("grace", 98.0, **plain))
    alone = throughput(*rows)
    assert alone.verdict == "reproduced"
    both = throughput(*rows, row("base", 155.0), row("grace", 281.0))
    assert both.verdict == "contradicted"
    assert both.here.endswith("; engine transformers: 3.16 x")
    # never one engine against the other: the fast one has no 16-bit row here
    mixed = throughput(*rows, row("grace", 281.0))
    assert "98" in mixed.here
    assert "281" not in mixed.here


def test_throughput_is_at_batch_1_and_the_shortest_context() -> None:
    many = {"batch": 8}
    rows = row("base", 1000.0, **many), row("grace", 9000.0, **many)
    told = throughput(*rows)
    assert (told.verdict, "at batch 1" in told.reason) == ("not testable here", True)
    long = {"context": 2048}
    told = throughput(
        *rows, row("base", 10.0, **long), row("grace", 99.0, **long), row("base", 155.0),
        row("grace", 281.0),
    )  # fmt: skip
    assert "281 tokens/s against `base` 155" in told.here


def test_throughput_is_against_the_16_bit_arm_that_it_was_made_from() -> None:
    made = known(arm("sft-gptq", (0.86,), method="gptq", source_seconds=50.5, **W4))
    rows = row("base", 100.0), row("sft", 160.0), row("sft-gptq", 281.0)
    assert "against `sft` 160" in throughput(*rows, arms=(*ARMS, made)).here
    assert "against `base` 100" in throughput(*rows[:2], row("gptq", 281.0)).here


@pytest.mark.parametrize(
    ("rows", "reason"),
    [
        ((row("base", 155.0),), "no arm at 4 bits whose speed was measured"),
        ((row("grace", 281.0),), "no untrained 16-bit or sft or kd arm whose speed was measured"),
        (
            (row("base", 155.0, dtype="float32"), row("grace", 700.0, dtype="float32")),
            "measured in float32",
        ),
        ((row("base", 155.0, moved_bytes=8e9), row("grace", 281.0)), "shape allows 2.2 x at most"),
        (
            (row("base", 155.0, engine="transformers"), row("grace", 281.0)),
            "not measured in one engine",
        ),
        (
            (
                row("base", 155.0),
                row("grace", 1.0, status="out of memory", decode_tokens_per_second=None),
            ),
            "not measured in one engine",
        ),
    ],
)
def test_what_keeps_throughput_from_being_tested(rows: tuple[SpeedRow, ...], reason: str) -> None:
    told = throughput(*rows)
    assert told.verdict == "not testable here"
    assert reason in told.reason


# --- the claim about memory ---------------------------------------------------------------------


def test_memory_is_that_in_use_where_it_was_measured() -> None:
    rows = row("base", 155.0), row("grace", 281.0)
    told = claim("memory", compared(*rows))
    assert told.verdict == "reproduced"
    assert "`grace` 4.5 GB against `base` 14.5 GB: -69 % in use" in told.here
    assert told.reason == "by the memory in use: peak, on NVIDIA H100"
    heavy = row("grace", 281.0, peak_bytes=9 * 10**9)  # although its checkpoint is small
    told = claim("memory", compared(rows[0], heavy))
    assert told.verdict == "contradicted"
    counted = [one.model_copy(update={"peak_bytes": None}) for one in rows]
    told = claim("memory", compared(*counted))
    assert "weights and cache, counted" in told.reason
    assert "4.3 GB against `base` 14.3 GB" in told.here


def test_memory_known_in_two_ways_is_not_compared() -> None:
    told = claim("memory", compared(row("base", 155.0, peak_bytes=None), row("grace", 281.0)))
    assert "in use (" not in told.here
    assert "memory in use was not measured" in told.reason
    wide = [row(name, 9.0, dtype="float32") for name in ("base", "grace")]
    assert "memory in use was not measured" in claim("memory", compared(*wide)).reason


# --- in the report ------------------------------------------------------------------------------


def test_tables_hold_what_was_measured() -> None:
    rows = [row("base", 155.0), row("grace", 281.0), row("grace", 1467.0, batch=8),
            row("grace", 90.0, context=2048)]  # fmt: skip
    told = compared(*rows)
    (block,) = told.tasks
    cost = {one["arm"]: one for one in cost_rows(block)}
    assert cost["grace"]["decode tok/s"] == "281"
    assert cost["grace"]["prefill tok/s"] == "10240"
    assert cost["grace"]["memory MB"] == "4500.0"
    assert cost["gptq"]["decode tok/s"] == "-"
    assert [(one["arm"], one["batch"], one["decode tok/s"]) for one in arm_speed_rows(block)] == [
        ("base", "1", "155 [152, 158]"),
        ("grace", "1", "281 [275, 287]"),
        ("grace", "8", "1467 [1438, 1496]"),
    ]
    assert "Not measured: `sft`, `gptq`." in about(block)
    page = render(told)
    assert "### Speed\n\n`qatbench speed` on NVIDIA H100, bfloat16" in page
    assert "281 [275, 287]" in render_html(told)
    bare = Comparison(baseline="base", tasks=(task(arms=ARMS),))
    assert "### Speed" not in render(bare)
    assert "decode tok/s" not in cost_rows(bare.tasks[0])[0]


def test_the_case_shown_is_the_one_of_most_arms() -> None:
    both = [row(name, rate, engine="transformers") for name, rate in (("base", 31.0), ("sft", 30))]
    (first, *_) = cases(compared(*both, row("grace", 281.0)).tasks[0].arms)
    assert first.engine == "transformers"
    (first, *_) = cases(compared(*both[:1], row("grace", 281.0)).tasks[0].arms)
    assert first.engine == "qatbench"


def test_accuracy_stands_against_speed() -> None:
    told = compared(row("base", 155.0), row("grace", 281.0), row("gptq", 290.0))
    panel = next(one for one in pareto.panels(told.tasks[0]) if one.kind == "speed")
    assert panel.label.startswith("decoded tokens/s, batch 1, context 512, engine qatbench")
    assert {point.arm.name: point.x for point in panel.points} == {
        "base": 155.0, "grace": 281.0, "gptq": 290.0,
    }  # fmt: skip
    assert [point.arm.name for point in panel.front] == ["grace", "gptq"]  # base is beaten in both
    assert panel.left_out == ("sft",)
    drawn = figures.figures(told)
    assert any("decoded tokens/s" in svg for svg in drawn.values())
    assert "grace (281 tokens/s, 84.0)" in pareto.words(told.tasks[0])


def test_without_speeds_there_is_no_panel_of_them() -> None:
    assert all(one.kind != "speed" for one in pareto.panels(comparison(pair(GRACE, GPTQ)).tasks[0]))


# --- the verb -----------------------------------------------------------------------------------


def run(*words: str) -> object:
    with pytest.raises(SystemExit) as ended:
        cli.main(list(words))
    return ended.value.code


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["qatbench"])
    for name, right in (("base", 30), ("gptq", 29)):
        bits = {} if name == "base" else W4
        write_run(Path(name), predictions(pattern(40, right)), method=name,
                  fingerprint=f"f-{name}", **bits)  # fmt: skip
    (tmp_path / "speed.json").write_text(
        measured(row("base", 155.0), row("gptq", 281.0)).model_dump_json()
    )
    return tmp_path


def test_the_verb_and_drawing_again(runs: Path) -> None:
    given = ("compare", "gptq", "--baseline", "base", "--draws", "100")
    assert run(*given, "--out", "with", "--speed", "speed.json") == 0
    value = json.loads((runs / "with" / "comparison.json").read_text())
    assert [bool(one["speed"]) for one in value["tasks"][0]["arms"]] == [True, True]
    verdict = {one["id"]: one["verdict"] for one in value["claims"]}["throughput"]
    assert verdict == "contradicted"
    files = {path.name: path.read_bytes() for path in (runs / "with").iterdir() if path.is_file()}
    assert run("compare", "--render", "with") == 0  # speeds are kept
    assert {name: (runs / "with" / name).read_bytes() for name in files} == files
    assert run(*given, "--out", "without") == 0
    assert run("compare", "--render", "without", "--speed", str(runs)) == 0  # and can come later
    assert (runs / "without" / "comparison.json").read_bytes() == files["comparison.json"]


@pytest.mark.parametrize(
    ("name", "text", "code", "said"),
    [
        ("gone.json", None, 3, "no gone.json"),
        ("torn.json", "{", 4, "torn.json is damaged or of another version"),
        ("other.json", '{"schema_version": 9}', 4, "schema_version"),
    ],
)
def test_a_measurement_that_cannot_be_read(
    runs: Path,
    capsys: pytest.CaptureFixture[str],
    name: str,
    text: str | None,
    code: int,
    said: str,
) -> None:
    if text is not None:
        (runs / name).write_text(text)
    assert run("compare", "gptq", "--baseline", "base", "--speed", name, "--out", "x") == code
    told = capsys.readouterr()
    assert told.err.startswith("error: ")
    assert said in told.err
    assert "\nhint: " in told.err
    assert not (runs / "x").exists()


def test_speeds_of_an_arm_are_a_record_of_their_own() -> None:
    with pytest.raises(ValueError, match="colour"):
        ArmSpeed.model_validate({"colour": "red"})
