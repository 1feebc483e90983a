"""The README's result table says what the committed comparison says."""

from __future__ import annotations

import csv
import importlib.util
import json
import re
import statistics
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]


def test_result_rows_are_those_of_the_committed_report() -> None:
    tables = ROOT / "results" / "smol-scienceqa" / "tables" / "arms.csv"
    if not tables.is_file():
        pytest.skip("results/smol-scienceqa is not in this copy")
    with tables.open(newline="") as stream:
        arms = {row["arm"]: row for row in csv.DictReader(stream)}
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `?([\w-]+)`? \| ([\d.]+) \| (\[.*?\]) \| (.*?) \| (.*?) \|", text, re.M)
    shown = {row[0]: row[1:] for row in rows if row[0] in arms}
    assert len(shown) == len(arms)
    for name, cells in shown.items():
        row = arms[name]
        assert cells == (row["acc %"], row["95 % CI"], row["diff"], row["p"]), name


def test_figures_of_the_drawn_benchmark_are_those_of_the_committed_report() -> None:
    tables = ROOT / "results" / "mini" / "tables" / "arms.csv"
    if not tables.is_file():
        pytest.skip("results/mini is not in this copy")
    with tables.open(newline="") as stream:
        rows = [row for row in csv.DictReader(stream) if row["task"] == "scienceqa"]
    accuracy = {row["arm"]: row["acc %"] for row in rows}
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    methods = ("rtn", "gptq", "awq", "qat", "grace")
    for bits in (4, 3, 2):
        cells = " | ".join(accuracy[f"{method}-w{bits}"] for method in methods)
        assert f"| {bits} | {cells} |" in text
    assert f"at 16 bits {accuracy['base']}" in text
    comparison = json.loads((ROOT / "results" / "mini" / "comparison.json").read_text())
    contests = {pair["arm"][-1]: pair for pair in comparison["tasks"][0]["contests"]}
    told = {bits: round(100 * contests[bits]["difference"], 1) for bits in "23"}
    low, high = (round(100 * contests["3"][end], 1) for end in ("low", "high"))
    assert f"At 2 bits training on the grid is {told['2']} points above the best PTQ" in text
    assert f"ahead by {told['3']} [{low:+}, {high:+}]" in text
    assert contests["2"]["p_holm"] < 0.001 < 0.05 < contests["3"]["p_holm"]


def test_written_answers_are_those_of_the_committed_report() -> None:
    tables = ROOT / "results" / "mini-written" / "tables" / "arms.csv"
    if not tables.is_file():
        pytest.skip("results/mini-written is not in this copy")
    with tables.open(newline="") as stream:
        rows = {r["arm"]: r["acc %"] for r in csv.DictReader(stream) if r["task"] == "scienceqa"}
    told = f"{rows['base']} at 16 bits, RTN {rows['rtn']}, AWQ {rows['awq']}, GRACE {rows['grace']}"
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert told in text
    comparison = json.loads((ROOT / "results" / "mini-written" / "comparison.json").read_text())
    (pair,) = (p for p in comparison["tasks"][0]["pairs"] if p["arm"] == "rtn-w4")
    lost, low, high = (round(100 * pair[key], 1) for key in ("difference", "low", "high"))
    assert f"RTN at 4 bits loses {-lost} [{low}, {high}]" in text
    assert pair["p_holm"] < 0.001


def test_parts_of_grace_are_told_as_the_committed_report_has_them() -> None:
    folder = ROOT / "results" / "mini-ablation"
    if not folder.is_dir():
        pytest.skip("results/mini-ablation is not in this copy")
    comparison = json.loads((folder / "comparison.json").read_text())
    parts = [row for row in comparison["tasks"][0]["ablations"] if row["part"] != "training"]
    assert len(parts) == 13  # 7 parts at 3 bits, 6 at 4; QAT for all of them among these
    assert {row["verdict"] for row in parts} == {"does not matter"}
    arms = json.loads((folder / "cost.json").read_text())["arms"]
    told = f"costs {arms['qat-w3']['ratio']:.2f} of a plain one, a step of GRACE "
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert told + f"{arms['grace-w3']['ratio']:.2f}" in text


def test_the_page_of_the_built_in_models_is_made_from_their_metrics() -> None:
    folder = ROOT / "results" / "mini-pretraining"
    if not (folder / "README.md").is_file():
        pytest.skip("results/mini-pretraining is not in this copy")
    assert (folder / "README.md").read_text(encoding="utf-8") == module("mini_models").page(folder)


def test_distillation_on_smol_is_told_as_the_committed_report_has_it() -> None:
    folder = ROOT / "results" / "smol-ablation"
    if not folder.is_dir():
        pytest.skip("results/smol-ablation is not in this copy")
    comparison = json.loads((folder / "comparison.json").read_text())
    parts = {row["part"]: row for row in comparison["tasks"][0]["ablations"]}
    row = parts.pop("distillation")
    worth = [round(100 * row["pair"][key], 1) for key in ("difference", "low", "high")]
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert "{:+} [{:+}, {:+}]\npoints over QAT".format(*worth) in text
    assert row["verdict"] == parts.pop("training")["verdict"] == "helps"
    assert {part["verdict"] for part in parts.values()} == {"does not matter"}


def test_the_training_step_is_told_as_it_was_measured() -> None:
    file = ROOT / "results" / "train-step" / "llava.json"
    if not file.is_file():
        pytest.skip("results/train-step is not in this copy")
    rows = {row["kind"]: row for row in json.loads(file.read_text())["rows"]}
    best = rows["grace, 10"]
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    told = f"{best['samples_per_second']:.2f} samples of 704 tokens a second at a peak of\n"
    assert told + f"{best['peak_gb']:.1f} GB" in text
    assert "--kept-blocks 10" in text


def beginning(rows: list[dict[str, float]]) -> float:
    """Where the least squares' line of microseconds by bytes begins."""
    micros = [row["us"] for row in rows]
    kilobytes = [row["us"] * row["gb_per_second"] for row in rows]
    return statistics.linear_regression(kilobytes, micros).intercept


def engine_table(model: Any) -> set[str]:
    """The rows of a model's table in docs/engine.md."""
    decode, prefill, gb = model["decode"], model["prefill"], model["weights_gb"]
    engines = ("transformers bf16", "engine bf16", "engine int4")
    told = set()
    rows = [("decoding, 1 row, ms a token", decode["1"], 2), ("prefill, 8 rows, ms", prefill, 1)]
    rows += [("decoding, 8 rows, ms a step", decode["8"], 2)] if "8" in decode else []
    for name, found, digits in rows:
        cells = " | ".join(f"{found[engine]['ms']:.{digits}f}" for engine in engines)
        ratio = found["engine bf16"]["ms"] / found["engine int4"]["ms"]
        assert ratio == pytest.approx(found["int4_over_bf16"])
        told.add(f"| {name} | {cells} | {ratio:.2f} x |")
    less = f"{100 * (gb['engine int4'] / gb['engine bf16'] - 1):.0f} %"
    told.add(f"| weights, GB | {' | '.join(f'{gb[e]:.2f}' for e in engines)} | {less} |")
    return told


@pytest.fixture
def measured_engines() -> tuple[Any, Any]:
    """The records of LLaVA-1.5-7B and Qwen2-VL-2B."""
    files = [ROOT / "results" / "engine" / f"{name}.json" for name in ("llava", "qwen")]
    if not all(file.is_file() for file in files):
        pytest.skip("results/engine is not in this copy")
    llava, qwen = (json.loads(file.read_text()) for file in files)
    return llava, qwen


def test_the_engine_is_told_as_it_was_measured(measured_engines: tuple[Any, Any]) -> None:
    record, other = measured_engines
    (model,), (small,) = record["models"], other["models"]
    assert (list(model["decode"]), list(small["decode"])) == (["1", "8"], ["1", "8"])
    one, eight, prefill = model["decode"]["1"], model["decode"]["8"], model["prefill"]
    told = {f"one {record['device']}", f"{record['copy_gb_per_second']:.0f} GB/s"}
    told |= engine_table(model) | engine_table(small)
    products = small["linears"]["1"][1]
    (head, screen), least = (row["us"] for row in products[-2:]), min(r["us"] for r in products)
    assert other["device"] == record["device"]
    told.add(f"takes {head:.0f} us by itself, and {screen:.0f} us in 8 bits")
    told.add(f"the smallest product takes {least:.1f} us")
    copy = model["weights_gb"]["engine bf16"] - model["weights_gb"]["transformers bf16"]
    told.add(f"the head in 8 bits, {copy:.2f} GB")
    told.add(f"decodes {one['int4_over_transformers']:.0f} x as fast at one row")
    told.add(f"quote for INT4 is {one['int4_over_bf16']:.2f}.")
    told |= {
        f"from {prefill[f'engine {kind}']['min']:.0f} to {prefill[f'engine {kind}']['max']:.0f} ms"
        for kind in ("bf16", "int4")
    }
    error = model["error"]
    assert error["of_them_with_a_gap_beyond_the_error"] == 0
    told.add(f"within {error['largest_over_spread']:.2f} of their spread")
    told.add(f"of {error['steps']} tokens {error['tokens_that_differ']} differ, none")
    lines = model["linears"]["1"]
    shares = [[round(100 * r["gb_per_second"] / record["copy_gb_per_second"]) for r in rows
               if r["kind"].startswith(kind) and "4096x4096" not in r["kind"]
               and not r["kind"].startswith("int8")]
              for rows, kind in zip(lines, ("", "int4"), strict=True)]  # fmt: skip
    told.add(f"bf16 reaches {min(shares[0])} to {max(shares[0])} % of the bandwidth")
    smallest = next(r for r in lines[1] if "int4 g128 4096x4096" in r["kind"])
    least = round(100 * smallest["gb_per_second"] / record["copy_gb_per_second"])
    told.add(f"INT4 {least} to {max(shares[1])} %")
    starts = [beginning(rows[:4]) for rows in lines]  # the head is no INT4 product
    told.add(f"begins at {starts[1]:.1f} us (bf16: {starts[0]:.1f})")
    page = " ".join((ROOT / "docs" / "engine.md").read_text(encoding="utf-8").split())
    for words in told:
        assert words in page, words
    changes = " ".join((ROOT / "CHANGELOG.md").read_text(encoding="utf-8").split())
    assert (
        f"INT4 {one['int4_over_bf16']:.2f} x bf16 in the same engine at batch 1,"
        f" {eight['int4_over_bf16']:.2f} x at batch 8" in changes
    )


def module(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / f"benchmarks/{name}.py")
    assert spec is not None
    assert spec.loader is not None
    found = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(found)
    return found


def test_tables_and_figures_are_what_make_results_makes() -> None:
    if not (ROOT / "results" / "mini" / "comparison.json").is_file():
        pytest.skip("results/ is not in this copy")
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    made = module("readme_results").made(ROOT / "results", readme)
    assert set(made) == {"README.md", "docs/figures/accuracy.svg", "docs/figures/pareto.svg"}
    assert made["README.md"] == readme
    for path in set(made) - {"README.md"}:  # other versions of matplotlib draw other bytes
        assert f"]({path})" in readme
        assert (ROOT / path).is_file()
    spoilt = readme.replace("| 71.5 |", "| 17.5 |")
    assert module("readme_results").made(ROOT / "results", spoilt)["README.md"] == readme


def test_the_page_of_the_schema_is_made_from_the_models() -> None:
    made = module("schema_doc")
    page = made.page()
    assert (ROOT / "docs" / "comparison.md").read_text(encoding="utf-8") == page
    assert "| `low` | number | fraction | 95 % Wilson interval of n questions" in page
    assert "| `making_seconds` | number or null | seconds | mean over seeds" in page
    assert "| `mean` | number | nats |  |" in page  # of Divergence
    assert "| `mean` | array of (number or null) | that of the term |" in page  # of Curve
    assert "| `decode_tokens_per_second` | [Spread](#spread) or null | tokens/s |" in page
    assert "## EvaluationRow" in page  # of speed.json alone
    assert "## SpeedCase" not in page  # no record
    assert "| `verdict` | string: `equivalent`, `better`, `worse`, `undecided` |  | by" in page


def test_every_number_of_the_schema_has_a_unit(monkeypatch: pytest.MonkeyPatch) -> None:
    made = module("schema_doc")
    rows = re.findall(r"^\| `(\w+)` \| (.*?) \| (.*?) \| .*\|$", made.page(), re.MULTILINE)
    assert len(rows) > 130
    for field, kind, unit in rows:
        assert bool(unit) == bool(re.search(r"\b(number|integer)\b|\[Spread\]", kind)), field
    known = {field for field, _, unit in rows if unit}
    named = {name.rsplit(".", 1)[-1] for names in made.UNITS.values() for name in names.split()}
    assert named == known  # none is of a field that there no longer is
    links = re.findall(r"\]\(#(\w+)\)", made.page())
    headings = re.findall(r"^## (\w+)$", made.page(), re.MULTILINE)
    assert set(links) <= {heading.lower() for heading in headings}
    monkeypatch.delitem(made._UNIT_OF, "p_holm")
    with pytest.raises(SystemExit, match=r"PairResult\.p_holm is a number without a unit"):
        made.page()


def test_the_simulation_is_told_as_it_came_out() -> None:
    file = ROOT / "results" / "statistics" / "simulation.json"
    if not file.is_file():
        pytest.skip("results/statistics is not in this copy")
    found = json.loads(file.read_text())
    held = [share for name, share in found["coverage"].items() if "clusters" in name]
    assert all(0.93 <= share <= 0.97 for share in found["coverage"].values())
    different = found["false"]["any pair called better or worse"]
    equivalent = found["false"]["any arm called equivalent to the baseline"]
    for row in (different, equivalent):
        low, high = row["interval"]
        assert 0 < low <= row["share"] <= high  # with too few questions nothing could be called so
        assert row["share"] <= 0.05
    assert equivalent["questions"] == 4000
    text = " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())
    assert f"in {100 * min(held):.1f} to {100 * max(held):.1f} % of {found['sets']}" in text
    assert f"any is called different in {100 * different['share']:.1f} %" in text
    told = (
        f"any is called equivalent in {100 * equivalent['share']:.1f} % when all are a margin worse"
    )
    assert told in text


def test_the_number_of_pairs_is_the_committed_one() -> None:
    file = ROOT / "results" / "mini" / "comparison.json"
    if not file.is_file():
        pytest.skip("results/mini is not in this copy")
    pairs = json.loads(file.read_text())["tasks"][0]["definition"]["family_size"]
    assert f"correction for {pairs} pairs" in (ROOT / "README.md").read_text(encoding="utf-8")


def test_guessing_and_the_lead_at_3_bits_are_the_committed_ones() -> None:
    files = [ROOT / "results" / name / "comparison.json" for name in ("smol-scienceqa", "mini")]
    pretraining = ROOT / "results" / "mini-pretraining" / "README.md"
    if not all(file.is_file() for file in (*files, pretraining)):
        pytest.skip("results/ is not in this copy")
    smol, mini = (json.loads(file.read_text())["tasks"][0] for file in files)
    text = " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())
    assert f"Guessing gives {100 * smol['arms'][0]['chance']:.1f}." in text
    four, three = smol["contests"]
    assert four["verdict"] == "undecided"
    assert (three["arm"], three["verdict"]) == ("grace-w3", "better")
    lead, low, high = (round(100 * three[key], 1) for key in ("difference", "low", "high"))
    assert f"at 3 bits GRACE is {lead} points above the best PTQ" in text
    assert f"({lead:+} [{low:+}, {high:+}], p <0.001)" in text
    assert three["p_holm"] < 0.001
    rows = re.findall(r"^\| scienceqa \| options.*$", pretraining.read_text(), re.MULTILINE)
    asked, guess, student, teacher = (cell.split()[0] for cell in rows[0].split(" | ")[2:])
    assert guess == f"{100 * mini['arms'][0]['chance']:.1f}"
    told = f"`mini/student` at 16 bits {student}, its teacher {teacher}, guessing {guess};"
    assert f"on the {asked} questions of the drawn benchmark, {told}" in text
    parts = [row for row in mini["ablations"] if row["part"] == "distillation"]
    assert len(parts) == 3  # "nowhere GRACE above QAT"
    assert "helps" not in {row["verdict"] for row in parts}


def test_no_committed_share_won_back_is_without_bounds() -> None:
    rows = [
        row
        for path in sorted((ROOT / "results").glob("*/comparison.json"))
        for task in json.loads(path.read_text(encoding="utf-8"))["tasks"]
        for row in task["recovery"]
        if row["share"] is not None
    ]
    if not rows:
        pytest.skip("no results are in this copy")
    for row in rows:
        assert -5 < row["low"] <= row["share"] <= row["high"] < 5, row


def test_claims_about_speed_follow_from_the_committed_measurement(
    measured_engines: tuple[Any, Any],
) -> None:
    figures, other = measured_engines

    def table(figures: Any) -> str:
        return str(module("readme_results").engine(figures, other))

    told = table(figures)
    assert "**contradicted**; 54 % less memory, here by the weights **reproduced**" in told
    alone = figures["models"][0]["decode"]["1"]
    for way, factor in (("engine bf16", 1.0), ("engine int4", 1 / 3.2)):
        alone[way] = {key: factor for key in ("ms", "min", "max")} | {"tokens_per_second": 1}
    figures["models"][0]["weights_gb"]["engine int4"] = 7.0
    told = table(figures)
    assert "3 x the throughput, here **reproduced**" in told
    assert "by the weights **contradicted**" in told
    alone["engine bf16"]["max"] = 4.0
    alone["engine bf16"]["min"] = 0.5
    assert "3 x the throughput, here **undecided**" in table(figures)


def test_int4_on_a_cpu_is_told_as_it_was_measured() -> None:
    folder = ROOT / "results" / "cpu-int4"
    if not folder.is_dir():
        pytest.skip("results/cpu-int4 is not in this copy")
    runs = [json.loads((folder / f"{name}.json").read_text())
            for name in ("smollm2", "smollm2-again", "smollm2-third")]  # fmt: skip
    ways = [run["option_mode, 2048 tokens a batch"] for run in runs]
    ratios = {}
    for way in ("int4 bf16 dense", "int4 bf16 library"):
        *some, last = (f"{ratio:.2f}" for ratio in sorted(one[way]["ratio"] for one in ways))
        ratios[way] = f"{', '.join(some)} and {last}"
    text = " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())
    assert f"answers {ratios['int4 bf16 dense']} times as many questions (three runs)" in text
    assert f"with the library's INT4 kernel {ratios['int4 bf16 library']} times." in text
    quiet = [run["option_mode, 512 tokens a batch"]["int4 bf16 dense"]["ratio"] for run in runs[1:]]
    assert f"512, {quiet[0]:.2f} and {quiet[1]:.2f} times in two quiet runs" in text
    for one in ways:
        assert one["int4 bf16 dense"]["ratio"] == pytest.approx(
            one["bf16 dense"]["ratio"], rel=0.02
        )
        assert one["int4 bf16 library"]["kernel"].startswith("Torch")
    scores = runs[0]["scores"]
    flips = [len(scores[way]["flips"]) for way in
             ("int4 bf16 dense", "int4 bf16 library", "bf16 dense")]  # fmt: skip
    told = "Of {} answers bf16 changes {} by the one, {} by the other, {} at 16 bits"
    assert told.format(scores["questions"], *flips) in text
