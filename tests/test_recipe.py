from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from textwrap import dedent

import pytest
import yaml

from qatbench.errors import PrerequisiteError, RecipeError
from qatbench.recipe import ArmRef, BetaSpec, Recipe
from qatbench.recipe_file import load_recipe
from qatbench.stages.grid_check import check_grid, check_name

ROOT = Path(__file__).resolve().parents[1]
RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))

HEAD = """\
name: small
student: smollm2-135m
teacher: {arm: sft}
data:
  train: scienceqa:train:text
  calibration: scienceqa:train:text
  eval: scienceqa:test:text
grid: {bits: 4, group_size: 64}
arms:
"""
FIRST_ARM = HEAD.count("\n") + 1  # the line after `arms:`


@pytest.fixture
def write(tmp_path: Path) -> Callable[[str], Path]:
    def to_file(text: str) -> Path:
        path = tmp_path / "r.yaml"
        path.write_text(text, encoding="utf-8")
        return path

    return to_file


@pytest.fixture
def arms(write: Callable[[str], Path]) -> Callable[[str], Recipe]:
    """Load HEAD with these arms; the first stands on line FIRST_ARM."""

    def load(text: str) -> Recipe:
        indented = "".join(f"  {line}\n" for line in dedent(text).strip().splitlines())
        return load_recipe(write(HEAD + indented), check_grid)

    return load


def problems(call: Callable[[], object]) -> list[str]:
    """Lines of the one RecipeError, without the path: `LINE: keys: what`."""
    with pytest.raises(RecipeError) as caught:
        call()
    assert caught.value.exit_code == 2
    lines = caught.value.message.splitlines()
    assert all("r.yaml:" in line for line in lines), lines
    return [line.partition("r.yaml:")[2] for line in lines]


# --- files that are right -----------------------------------------------------------------------


def test_there_are_recipes() -> None:
    assert RECIPES  # or the next test would pass by testing nothing


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_shipped_recipe_parses(path: Path) -> None:
    recipe = load_recipe(path, check_grid)

    assert sorted(recipe.order()) == sorted(recipe.arms)
    for arm in recipe.arms.values():
        recipe.training_of(arm)


def test_no_two_recipes_write_to_one_folder() -> None:
    names = [load_recipe(path, check_grid).name for path in RECIPES]
    assert sorted(names) == sorted(set(names))  # results lie at results/<name>/


def test_every_committed_result_is_of_a_committed_recipe() -> None:
    recipes = {recipe.name: recipe for recipe in (load_recipe(p, check_grid) for p in RECIPES)}
    locks = sorted(ROOT.glob("results/*/recipe.lock.yaml"))
    ours = [lock for lock in locks if not lock.parent.name.endswith("demo")]  # those are not kept
    if not ours:
        pytest.skip("results/ is not in this copy")
    for lock in ours:
        used = Recipe.model_validate(yaml.safe_load(lock.read_text(encoding="utf-8")))
        assert used == recipes[lock.parent.name], lock


def test_defaults(write: Callable[[str], Path]) -> None:
    recipe = load_recipe(
        write("name: d\nstudent: a/b\ndata: {eval: scienceqa}\narms: {base: {kind: base}}\n")
    )

    assert (recipe.grid.bits, recipe.grid.group_size) == (4, 128)
    assert recipe.data.eval == ("scienceqa",)  # one text is a list of one
    assert (recipe.evaluation.protocol, recipe.evaluation.mode) == ("qatbench", "options")
    assert recipe.training.seeds == (0,)
    assert recipe.distillation.temperature == 2.0
    assert recipe.distillation.nontarget_weight == 4.0
    assert (recipe.calibration.samples, recipe.calibration.iters) == (128, 200)
    assert recipe.margin == 1.0
    assert recipe.teacher is None
    assert recipe.baseline is None
    arm = recipe.arms["base"]
    assert (arm.gate, arm.rcka, arm.beta, arm.kl) == (True, True, "adaptive", "decoupled")


def test_an_arm_overrides_grid_and_training_and_nothing_else(
    arms: Callable[[str], Recipe],
) -> None:
    recipe = arms("""
        sft: {kind: sft}
        qat: {kind: qat, grid: {bits: 3, group_size: 32}, training: {lr: 0.5, seeds: [7]}}
    """)

    grid = recipe.grid_of(recipe.arms["qat"])
    assert (grid.bits, grid.group_size) == (3, 32)
    assert recipe.grid_of(recipe.arms["sft"]) == recipe.grid
    changed = recipe.training_of(recipe.arms["qat"])
    assert changed == recipe.training.model_copy(update={"lr": 0.5, "seeds": (7,)})
    assert recipe.training_of(recipe.arms["sft"]) == recipe.training


def test_seeds_come_from_training_or_from_the_arm_it_is_made_of(
    arms: Callable[[str], Recipe],
) -> None:
    recipe = arms("""
        base: {kind: base}
        rtn: {kind: rtn}
        sft: {kind: sft, training: {seeds: [3, 1, 2]}}
        sft-rtn: {kind: rtn, of: sft}
        qat: {kind: qat}
        tuned: {kind: qat, of: sft}
    """)

    assert recipe.seeds_of("base") == (None,)
    assert recipe.seeds_of("rtn") == (None,)
    assert recipe.seeds_of("sft") == (3, 1, 2)
    assert recipe.seeds_of("sft-rtn") == (3, 1, 2)
    assert recipe.seeds_of("qat") == (0,)
    assert recipe.seeds_of("tuned") == (0,)  # its own training, not that of the arm below it


CHAIN = """
    graced: {kind: grace, of: kd}
    kd: {kind: kd}
    sft-gptq: {kind: gptq, of: sft}
    sft-autoround: {kind: autoround, of: sft}
    sft: {kind: sft}
    base: {kind: base}
"""


def test_needs_are_the_arm_below_and_the_teacher(arms: Callable[[str], Recipe]) -> None:
    recipe = arms(CHAIN)

    assert recipe.needs("base") == []
    assert recipe.needs("sft") == []  # no taught arm: the teacher is nothing to it
    assert recipe.needs("sft-gptq") == ["sft"]
    assert recipe.needs("kd") == ["sft"]
    assert recipe.needs("graced") == ["kd", "sft"]


def test_a_teacher_that_is_a_model_is_no_arm(write: Callable[[str], Path]) -> None:
    text = HEAD.replace("{arm: sft}", "a/teacher") + "  kd: {kind: kd}\n"
    assert load_recipe(write(text), check_grid).needs("kd") == []


def test_order_puts_every_arm_after_what_it_needs(arms: Callable[[str], Recipe]) -> None:
    recipe = arms(CHAIN)

    order = recipe.order()
    assert sorted(order) == sorted(recipe.arms)
    for name in order:
        assert all(order.index(other) < order.index(name) for other in recipe.needs(name))
    assert recipe.order(("kd",)) == ["sft", "kd"]
    assert recipe.order(("base",)) == ["base"]
    assert recipe.order(("graced", "sft-gptq")) == ["sft", "kd", "graced", "sft-gptq"]


def test_teachers_and_starts(arms: Callable[[str], Recipe]) -> None:
    recipe = arms(
        """
        sft: {kind: sft}
        gptq: {kind: gptq}
        own: {kind: grace, of: sft, teacher: self}
        self: {kind: grace, teacher: self}
        other: {kind: kd, teacher: some/model}
        start: {kind: qat, init: gptq}
        """
    )
    told = {name: recipe.teacher_of(arm) for name, arm in recipe.arms.items()}
    assert told["own"] == ArmRef(arm="sft")  # what it is trained from, before that
    assert told["self"] == recipe.student
    assert told["other"] == "some/model"
    assert told["start"] is None
    assert recipe.needs("start") == ["gptq"]
    assert recipe.needs("self") == []


def test_a_controller_of_the_released_code_by_its_name(arms: Callable[[str], Recipe]) -> None:
    recipe = arms(
        """
        sft: {kind: sft}
        a: {kind: grace, controller: class-defaults}
        b: {kind: grace, controller: launch-script}
        """
    )
    assert recipe.arms["a"].controller == BetaSpec(
        target=0.35, rate=0.0015, initial=1.0, low=0.1, high=5.0, ema=0.99
    )
    assert recipe.arms["b"].controller == BetaSpec()  # the default


def test_several_sources_of_training_data(write: Callable[[str], Path]) -> None:
    text = HEAD.replace(
        "  train: scienceqa:train:text\n",
        "  train:\n    - {questions: scienceqa:train, weight: 2}\n"
        "    - {conversations: mix.json, images: pictures}\n",
    )
    recipe = load_recipe(write(text + "  sft: {kind: sft}\n"), check_grid, check_name)
    assert [source.weight for source in recipe.data.train] == [2.0, 1.0]
    assert recipe.data.train[1].images == "pictures"
    bad = text.replace("conversations: mix.json", "questions: scienceqa:train")
    found = problems(lambda: load_recipe(write(bad + "  sft: {kind: sft}\n"), check_grid))
    assert "`images` belongs to `conversations`" in found[0]


# --- one problem --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "line", "keys", "what"),
    [
        ("a: {kind: base, colour: red}", 0, "arms.a.colour", "extra inputs are not permitted"),
        ("a: {kind: bogus}", 0, "arms.a.kind", "'grace'"),
        ("a: {kind: base}\nb: {kind: rtn,\n  grid: {bits: 5}}", 2, "arms.b.grid.bits", "4 or 8"),
        ("a: {kind: rtn, grid: {group_size: 48}}", 0, "arms.a.grid.group_size", "64, 128"),
        ("a: {kind: base}\nb:\n  kind: rtn\n  of: c", 3, "arms.b.of", "no arm 'c'; there are a, b"),
        ("a: {kind: rtn}\nb: {kind: gptq, of: a}", 1, "arms.b.of", "'a' is quantized already"),
        ("a: {kind: autoround}\nb: {kind: rtn, of: a}", 1, "arms.b.of", "'a' is quantized already"),
        ("a: {kind: qat}\nb: {kind: sft, of: a}", 1, "arms.b.of", "'a' is quantized already"),
        ("a: {kind: base}\nb: {kind: base, of: a}", 1, "arms.b.of", "the student itself"),
        ("a: {kind: qat, gate: false}", 0, "arms.a.gate", "only a grace arm"),
        ("a: {kind: kd, kl: plain}", 0, "arms.a.kl", "not kd"),
        ("a: {kind: qat, rcka: true}", 0, "arms.a.rcka", "only a grace arm"),  # even if it is on
        ("a: {kind: rtn, beta: fixed}", 0, "arms.a.beta", "only a grace arm"),
        ("a: {kind: qat, controller: {rate: 0}}", 0, "arms.a.controller", "only a grace arm"),
        ("a: {kind: sft, grid: {bits: 4}}", 0, "arms.a.grid", "not quantized"),
        ("a: {kind: rtn, training: {lr: 1}}", 0, "arms.a.training", "not trained"),
        ("a:\n  kind: sft\n  training:\n    lrr: 1", 3, "arms.a.training.lrr", "extra inputs"),
        ("a:\n  kind: sft\n  training:\n    lr: -1", 3, "arms.a.training.lr", "greater than 0"),
        ("a: {kind: sft}\n'b/c': {kind: base}", 1, "arms.b/c", "an arm's name is letters"),
        ("a: {kind: rtn}\nb: {kind: sft, init: a}", 1, "arms.b.init", "only qat and grace start"),
        ("a: {kind: sft}\nb: {kind: qat, init: a}", 1, "arms.b.init", "'a' is not quantized"),
        ("a: {kind: sft}\nb: {kind: qat, init: c}", 1, "arms.b.init", "no arm 'c'"),
        ("a: {kind: sft}\nb: {kind: qat, teacher: self}", 1, "arms.b.teacher", "has no teacher"),
        ("a: {kind: kd, teacher: {arm: c}}", 0, "arms.a.teacher.arm", "no arm 'c'"),
        ("a: {kind: grace, controller: quick}", 0, "arms.a.controller", "no preset 'quick'"),
        ("a: {kind: kd, tokens: all}", 0, "arms.a.tokens", "only a grace arm"),
    ],
)
def test_a_wrong_arm_is_told_with_its_line(
    arms: Callable[[str], Recipe], text: str, line: int, keys: str, what: str
) -> None:
    # HEAD's teacher must exist where it is not what is tested
    found = problems(lambda: arms(f"{text}\nsft: {{kind: sft}}" if "sft:" not in text else text))

    assert len(found) == 1, found
    assert found[0].startswith(f"{FIRST_ARM + line}: {keys}: "), found
    assert what in found[0]


@pytest.mark.parametrize(
    ("old", "new", "arm", "line", "what"),
    [
        ("name: small", "name: small\nnmae: x", "{kind: base}", 2, "nmae: extra inputs"),
        ("name: small", "name: ../up", "{kind: base}", 1, "name: string should match"),
        ("bits: 4", "bits: 6", "{kind: rtn}", 8, "grid.bits: input should be 2, 3, 4 or 8"),
        ("group_size: 64", "group_size: 0", "{kind: rtn}", 8, "grid.group_size: input should be"),
        ("{arm: sft}", "{arm: gone}", "{kind: base}", 3, "teacher.arm: no arm 'gone'"),
        ("teacher: {arm: sft}\n", "", "{kind: kd}", 9, "arms.sft.kind: kd needs a `teacher`"),
        ("teacher: {arm: sft}\n", "", "{kind: grace}", 9, "arms.sft.kind: grace needs a `teacher`"),
        ("  train: scienceqa:train:text\n", "", "{kind: qat}", 9, "qat needs `data.train`"),
        ("  calibration: scienceqa:train:text\n", "", "{kind: awq}", 9, "needs `data.calibration`"),
        (
            "  calibration: scienceqa:train:text\n",
            "",
            "{kind: autoround}",
            9,
            "autoround needs `data.calibration`",
        ),
        (
            "grid: {",
            "calibration: {iters: 0}\ngrid: {",
            "{kind: autoround}",
            8,
            "calibration.iters: input should be greater than or equal to 1",
        ),
        ("name: small", "name: small\nbaseline: x", "{kind: base}", 2, "baseline: no arm 'x'"),
        ("name: small", "name: small\nmargin: 0", "{kind: base}", 2, "margin: input should be gre"),
        ("  eval: scienceqa:test:text", "  eval: []", "{kind: base}", 7, "data.eval: tuple should"),
        ("name: small\n", "", "{kind: base}", 1, "name: field required"),
    ],
)
def test_a_wrong_section_is_told_with_its_line(
    write: Callable[[str], Path], old: str, new: str, arm: str, line: int, what: str
) -> None:
    assert old in HEAD
    text = HEAD.replace(old, new) + f"  sft: {arm}\n"

    found = problems(lambda: load_recipe(write(text), check_grid))

    assert len(found) == 1, found
    assert found[0].startswith(f"{line}: "), found
    assert what in found[0]


def test_no_arms_is_a_problem(write: Callable[[str], Path]) -> None:
    text = HEAD.replace("arms:\n", "arms: {}\n")
    assert any(line.startswith("9: arms:") for line in problems(lambda: load_recipe(write(text))))


@pytest.mark.parametrize(
    ("text", "circle"),
    [
        ("sft: {kind: sft, of: sft}", "sft -> sft"),
        ("sft: {kind: sft, of: b}\nb: {kind: sft, of: sft}", "sft -> b -> sft"),
        ("sft: {kind: kd}", "sft -> sft"),  # it would be its own teacher
        ("sft: {kind: sft, of: b}\nb: {kind: kd}", "sft -> b -> sft"),
    ],
)
def test_a_cycle_is_told_with_its_way(
    arms: Callable[[str], Recipe], text: str, circle: str
) -> None:
    assert problems(lambda: arms(text)) == [f"{FIRST_ARM}: arms.sft: is made from itself: {circle}"]


def test_a_cycle_names_only_arms_that_are_on_it(arms: Callable[[str], Recipe]) -> None:
    found = problems(lambda: arms("k: {kind: kd, of: s}\ns: {kind: sft, of: k}\nsft: {kind: sft}"))
    assert found == [f"{FIRST_ARM}: arms.k: is made from itself: k -> s -> k"]


def test_a_group_size_that_does_not_divide_names_the_layer(
    arms: Callable[[str], Recipe], write: Callable[[str], Path]
) -> None:
    found = problems(lambda: arms("sft: {kind: sft}\na: {kind: rtn, grid: {group_size: 128}}"))
    assert len(found) == 6  # all linears but down_proj, whose 1536 inputs it divides; one line each
    assert all(line.startswith(f"{FIRST_ARM + 1}: arms.a.grid: ") for line in found)
    assert "group_size 128 does not divide the 576 inputs of" in found[0]
    assert "model.layers.0.self_attn.q_proj" in found[0]
    assert not any("down_proj" in line for line in found)

    top = HEAD.replace("group_size: 64", "group_size: 128")
    quantized = "  sft: {kind: sft}\n  a: {kind: rtn}\n  b: {kind: gptq}\n"
    found = problems(lambda: load_recipe(write(top + quantized), check_grid))
    assert len(found) == 6  # the shared grid is told once, not once an arm
    assert all(line.startswith("8: grid: ") for line in found)


def test_a_grid_that_no_arm_uses_is_not_checked(write: Callable[[str], Path]) -> None:
    top = HEAD.replace("group_size: 64", "group_size: 128") + "  sft: {kind: sft}\n"
    assert load_recipe(write(top), check_grid).grid.group_size == 128


def test_a_student_that_is_not_there_is_told_with_its_line(
    write: Callable[[str], Path], tmp_path: Path
) -> None:
    text = HEAD.replace("smollm2-135m", str(tmp_path / "gone")) + "  sft: {kind: sft}\n"
    found = problems(lambda: load_recipe(write(text + "  a: {kind: rtn}\n"), check_grid))
    assert found == [f"2: student: no model at {tmp_path / 'gone'}"]
    with pytest.raises(PrerequisiteError):
        check_grid(str(tmp_path / "gone"), 4, 64)


# --- files that are no recipe -------------------------------------------------------------------


def test_bad_yaml_is_told_with_its_line(write: Callable[[str], Path]) -> None:
    found = problems(lambda: load_recipe(write("name: a\nstudent: [b\narms: {}\n")))
    assert len(found) == 1
    assert found[0].startswith("3: not YAML: ")


@pytest.mark.parametrize("text", ["", "- a\n- b\n", "just words\n", "42\n"])
def test_another_thing_than_a_mapping(write: Callable[[str], Path], text: str) -> None:
    with pytest.raises(RecipeError, match=r"r\.yaml: a recipe is a mapping"):
        load_recipe(write(text))


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"cannot read .*gone\.yaml: No such file") as caught:
        load_recipe(tmp_path / "gone.yaml")
    assert caught.value.hint
    with pytest.raises(RecipeError, match="cannot read"):
        load_recipe(tmp_path)
    (tmp_path / "r.yaml").write_bytes(b"name: \xff\xfe\n")
    with pytest.raises(RecipeError, match="not a text file"):
        load_recipe(tmp_path / "r.yaml")


def test_an_impossible_date_is_not_a_bug(write: Callable[[str], Path]) -> None:
    assert problems(lambda: load_recipe(write("name: 2026-13-45\n")))


def test_two_arms_of_one_name_are_a_problem(arms: Callable[[str], Recipe]) -> None:
    text = "sft: {kind: sft}\nqat: {kind: qat}\nqat: {kind: qat, training: {lr: 1}}"
    assert any("qat" in line for line in problems(lambda: arms(text)))


# --- names ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("old", "new", "line", "what"),
    [
        ("eval: scienceqa:test:text", "eval: scienceqa:test:pictures", 7, "unknown subset"),
        ("train: scienceqa:train:text", "train: trivia:train", 5, "data.train: unknown task"),
        ("name: small", "evaluation: {protocol: llava}\nname: small", 1, "unknown protocol"),
        ("name: small", "training: {formats: [qatbench, choice]}\nname: small", 1, "'choice'"),
    ],
)
def test_an_unknown_name_is_told_with_its_line(
    write: Callable[[str], Path], old: str, new: str, line: int, what: str
) -> None:
    assert old in HEAD
    text = HEAD.replace(old, new) + "  sft: {kind: sft, training: {formats: [choices]}}\n"
    found = problems(lambda: load_recipe(write(text), check_grid, check_name))
    assert len(found) == 1, found
    assert found[0].startswith(f"{line}: ")
    assert what in found[0]


def test_candidates_are_checked_before_they_are_trained(write: Callable[[str], Path]) -> None:
    tuning = (
        "tuning:\n  data: scienceqa:train:text\n  candidates:\n"
        "    sft: [{lr: 1.0e-4}, {lrr: 1.0}]\n    gone: [{lr: 1.0e-4}]\n"
        "    sfg: [{beta_rate: -1, lr: 1.0e-4}]\n"
    )
    text = tuning + HEAD + "  sft: {kind: sft}\n  sfg: {kind: grace}\n"
    found = problems(lambda: load_recipe(write(text), check_grid, check_name))
    assert [line.split(": ")[:2] for line in found] == [
        ["4", "tuning.candidates.sft"],
        ["5", "tuning.candidates.gone"],
        ["6", "tuning.candidates.sfg"],
    ]
    assert "lrr: Extra inputs" in found[0]


# --- many problems ------------------------------------------------------------------------------


def test_unknown_keys_bits_and_group_sizes_are_told_together(write: Callable[[str], Path]) -> None:
    text = HEAD.replace("name: small", "name: small\nnmae: x").replace("size: 64", "size: 128")
    text += "  sft: {kind: sft, colour: red}\n  a: {kind: rtn, grid: {bits: 5}}\n  b: {kind: rtn}\n"

    found = problems(lambda: load_recipe(write(text), check_grid))

    starts = {line.split(": ")[0] + " " + line.split(": ")[1] for line in found}
    assert starts == {"2 nmae", "11 arms.sft.colour", "12 arms.a.grid.bits", "9 grid"}
    assert sum("does not divide" in line for line in found) == 6


def test_problems_between_arms_are_told_together(arms: Callable[[str], Recipe]) -> None:
    found = problems(
        lambda: arms("""
            a: {kind: rtn, of: gone}
            b: {kind: qat, gate: false, training: {lrr: 1, steps: 0}}
            c: {kind: gptq, of: a, grid: {group_size: 128}}
        """)
    )

    told = [line.split(": ")[:2] for line in found]
    first = str(FIRST_ARM)
    assert [first, "arms.a.of"] in told
    assert [str(FIRST_ARM + 1), "arms.b.gate"] in told
    assert [str(FIRST_ARM + 1), "arms.b.training.lrr"] in told
    assert [str(FIRST_ARM + 1), "arms.b.training.steps"] in told
    assert [str(FIRST_ARM + 2), "arms.c.of"] in told
    assert [str(FIRST_ARM + 2), "arms.c.grid"] in told
    assert ["3", "teacher.arm"] in told


def test_bits_and_group_size_of_one_grid_are_told_together(write: Callable[[str], Path]) -> None:
    text = HEAD.replace("bits: 4, group_size: 64", "bits: 5, group_size: 128")
    text = text.replace("name: small", "name: small\nnmae: x")
    found = problems(lambda: load_recipe(write(text + "  sft: {kind: qat}\n"), check_grid))

    assert any("nmae" in line for line in found)
    assert any("grid.bits" in line for line in found)
    assert any("does not divide the 576 inputs" in line for line in found)


def test_the_default_grid_is_told_beside_a_typo(write: Callable[[str], Path]) -> None:
    text = HEAD.replace("grid: {bits: 4, group_size: 64}\n", "nmae: x\n")
    found = problems(lambda: load_recipe(write(text + "  sft: {kind: qat}\n"), check_grid))

    assert any("nmae" in line for line in found)
    assert any("group_size 128 does not divide" in line for line in found)


def test_a_typo_does_not_hide_a_missing_arm(arms: Callable[[str], Recipe]) -> None:
    found = problems(lambda: arms("sft: {kind: sft, colour: red}\na: {kind: rtn, of: gone}"))

    assert any("colour" in line for line in found)
    assert any("no arm 'gone'" in line for line in found)


def test_a_typo_does_not_make_an_unused_grid_a_problem(write: Callable[[str], Path]) -> None:
    text = HEAD.replace("group_size: 64", "group_size: 128") + "  sft: {kind: sft, colour: red}\n"
    found = problems(lambda: load_recipe(write(text), check_grid))
    assert [line.split(": ")[1] for line in found] == ["arms.sft.colour"]
