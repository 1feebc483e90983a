"""report.html as text: what is on it, and that nothing in it is fetched or run by mistake."""

from __future__ import annotations

import io
import re
import tomllib
from collections import Counter
from functools import cache
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from report_case import KEPT, full
from test_markdown import BASE, GPTQ, GRACE, comparison, pair

from qatbench.errors import ArtifactError
from qatbench.records import Question
from qatbench.report import cards, cells, drawings, gallery
from qatbench.report.html import render
from qatbench.report.model import Comparison, TaskComparison
from qatbench.report.prose import prose
from qatbench.report.sections import LENGTHY, Section, sections
from qatbench.report.verdict import decisions
from qatbench.stages.gallery import built_in, load
from qatbench.tasks import selector

VOID = {"meta", "link", "img", "br", "input", "wbr"}
SVG = '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 9 9">{}</svg>'


class Page(HTMLParser):
    """Elements with their attributes, and the text of each kind of element and class."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[tuple[str, str]] = []
        self.texts: list[tuple[frozenset[str], str]] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append((tag, dict(attrs).get("class") or ""))

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop()[0] == tag, f"</{tag}> closes something else"

    def handle_data(self, data: str) -> None:
        names = {name for tag, kind in self.open for name in (tag, *kind.split())}
        self.texts.append((frozenset(names), data))

    def values(self, key: str) -> list[str]:
        return [str(attrs[key]) for _, attrs in self.elements if key in attrs]

    def text(self, *within: str) -> str:
        told = " ".join(text for names, text in self.texts if names.issuperset(within))
        return " ".join(told.split())


@cache
def everything() -> Comparison:
    return full()


@cache
def filled() -> Page:
    return Page(render(everything(), gallery=load(everything(), {})))


@cache
def bare() -> Page:
    return Page(render(everything()))


def test_it_is_a_pure_function_of_what_it_is_given() -> None:
    assert render(full()) == render(everything())


def test_nothing_is_fetched() -> None:
    page = filled()
    assert not [tag for tag, attrs in page.elements if tag in ("iframe", "object", "embed", "base")]
    assert not [attrs for tag, attrs in page.elements if tag == "script" and attrs]
    assert all(source.startswith("data:image/") for source in page.values("src"))
    (policy,) = [
        attrs["content"]
        for _, attrs in page.elements
        if attrs.get("http-equiv") == "Content-Security-Policy"
    ]
    assert str(policy).startswith(
        "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:"
    )
    styles = page.text("style")
    assert "@import" not in styles
    assert "url(" not in styles
    outside = {href for href in page.values("href") if re.match(r"[a-z]+:", href)}
    assert outside <= {"data:,", "https://arxiv.org/abs/2601.22709"}


def test_ids_are_unique_and_every_link_inside_leads_somewhere() -> None:
    page = filled()
    ids = Counter(page.values("id"))
    assert max(ids.values()) == 1
    inside = {href[1:] for href in page.values("href") if href.startswith("#")}
    assert inside <= ids.keys()
    assert {"verdict", "task-1-gallery", "task-2-definition", "claims", "method"} <= inside


def test_what_scrolls_can_be_reached_and_has_a_name() -> None:
    boxes = [a for _, a in filled().elements if "scroll" in (a.get("class") or "").split()]
    assert len(boxes) > 10
    assert all((a["tabindex"], a["role"]) == ("0", "region") and a["aria-label"] for a in boxes)


def test_headings_skip_no_level() -> None:
    levels = [int(tag[1]) for tag, _ in filled().elements if re.fullmatch(r"h[1-6]", tag)]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(after <= before + 1 for before, after in pairwise(levels))


def test_the_first_screen_ships_what_the_verdict_ships() -> None:
    page, told = filled(), []
    for task in everything().tasks:
        for decision in decisions(task, "base"):
            assert decision.contest is not None
            told.append(f"Ship {decision.shipped.name}")
            assert cells.tables.difference(decision.contest) in page.text("card", "numbers")
    shown = re.findall(r"Ship \S+", page.text("card", "ship"))
    assert shown == told
    assert len(told) == 6


@pytest.mark.parametrize(
    ("numbers", "badge", "headline", "why"),
    [
        ({}, "QAT is ahead", "QAT is ahead of PTQ at 4 bits.", "It beats the best PTQ arm, `gptq`"),
        ({"difference": -0.06, "low": -0.08, "high": -0.04}, "PTQ is ahead",
         "PTQ is ahead of QAT at 4 bits.", "It beats the best QAT arm, `grace`"),
        ({"verdict": "equivalent"}, "equivalent",
         "QAT and PTQ are equivalent within ±1 points at 4 bits.", "As good as the best QAT arm"),
        ({"p_holm": 0.06, "verdict": "undecided"}, "no difference shown",
         "No difference between QAT and PTQ is shown at 4 bits.",
         "The lead of QAT does not outlive the correction for 3 pairs: the cheaper one ships."),
        ({"low": -0.01, "verdict": "undecided"}, "no difference shown",
         "No difference between QAT and PTQ is shown at 4 bits.", "No difference to the best QAT"),
    ],
)  # fmt: skip
def test_a_card_says_how_qat_and_ptq_stand(
    numbers: dict[str, Any], badge: str, headline: str, why: str
) -> None:
    result = comparison(pair(GRACE, GPTQ, **numbers))
    (card,) = cards.cards(result, result.tasks[0])
    assert card.badge == badge
    assert cards.headline(result.tasks[0], [card]) == headline
    assert why in card.why
    assert card.price.startswith("The price of QAT: 8 min instead of 61 s, 8.2 times as much, ")


def test_qat_that_costs_less_is_no_price() -> None:
    dear = GPTQ.model_copy(update={"source_seconds": 900.0})
    result = comparison(pair(GRACE, dear), BASE, dear, GRACE)
    (card,) = cards.cards(result, result.tasks[0])
    assert card.price == "QAT costs no more here: 8 min instead of 16 min, for +6.4 points."
    assert card.how == "GRACE: trained on the integer grid (QAT)"


def test_a_headline_joins_the_grids_with_one_outcome() -> None:
    (task, *_) = everything().tasks
    told = cards.headline(task, cards.cards(everything(), task))
    assert told == "QAT is ahead of PTQ at 2 bits; no difference is shown at 4 and 3 bits."


def test_without_a_contest_the_best_arm_is_named_and_nothing_is_shipped() -> None:
    page = Page(render(comparison(None, BASE, GPTQ)))
    assert page.text("card", "ship") == "Best quantized arm: gptq"
    assert page.text("h1") == "What to ship"
    unknown = GPTQ.model_copy(update={"method": None, "bits": None, "bits_per_weight": None})
    shown = Page(render(comparison(None, BASE, unknown))).text("card", "ship")
    assert shown == "Most accurate: gptq"


def test_parts_without_content_are_left_out() -> None:
    page = Page(render(comparison(pair(GRACE, GPTQ))))
    ids = set(page.values("id"))
    assert {"verdict", "words", "task-1-arms", "task-1-pairs", "method"} <= ids
    absent = {"claims", "training", "figures", "task-1-gallery", "task-1-changed", "task-1-groups"}
    assert not ids & absent
    assert not {f"#{name}" for name in absent} & set(page.values("href"))


def test_everything_that_was_found_out_is_on_the_page() -> None:
    text = filled().text()
    assert "Shown to differ by less than ±1 points" in text
    assert "Macro" not in text
    for part in ("What each part of GRACE is worth", "Where they differ", "Do the arms answer",
                 "won back: 42 % [20, 70]", "noise floor, seeds of sft", "✓ reproduced",
                 "✗ contradicted", "? undecided", "– not testable here", "DIFFERENT_GRID",
                 "How the numbers are computed", "5efb5248a6540bcad46653ba6a19bece3ce2e59a1e7695ae",
                 "chat template, one user turn", "bootstrap of 10000 draws, seed 0", "mini-bits",
                 "KL 95 %", "torch 2.15.0"):  # fmt: skip
        assert part in text, part


def test_accuracies_lead_to_the_answers_behind_them() -> None:
    hrefs = filled().values("href")
    for name in ("base/predictions.jsonl.gz", "qat-w2/seed-1/predictions.jsonl.gz"):
        assert any(href.endswith(name) for href in hrefs), name


def test_a_path_cannot_become_another_kind_of_link() -> None:
    sly = GPTQ.model_copy(update={"predictions": ("javascript:alert(1)",)})
    hrefs = Page(render(comparison(None, BASE, sly))).values("href")
    assert "javascript%3Aalert%281%29" in hrefs


def test_markup_in_names_and_questions_is_text() -> None:
    evil = "<script>alert(1)</script><img src=x onerror=alert(2)>"
    arm = GPTQ.model_copy(update={"name": evil, "notes": (evil,), "label": evil, "grid": evil})
    result = comparison(pair(GRACE, arm), BASE, arm, GRACE)
    case = everything()
    flip = case.tasks[0].changes[-1].flips[0]
    changes = case.tasks[0].changes[-1].model_copy(update={"arm": evil, "flips": (flip,)})
    task = result.tasks[0].model_copy(update={"changes": (changes,)})
    asked = Question(id=flip.id, task="t", text=evil, options={flip.gold: evil}, hint=evil)
    shown = {("scienceqa:test:text", flip.id): asked}
    page = Page(render(result.model_copy(update={"tasks": (task,)}), gallery=shown))
    kinds = Counter(tag for tag, _ in page.elements)
    assert kinds["script"] == 1
    assert kinds["img"] == 0
    assert page.text("question") == evil


def test_without_data_the_gallery_holds_ids_and_letters() -> None:
    page = bare()
    assert not page.values("src")
    assert "qatbench compare --render DIR --data PATH" in page.text("fill")
    assert re.search(r"B ✓ right answer ✓ grace-w2 C ✗ gptq-w2", page.text("flip", "options"))
    assert not page.text("flip", "question")


def test_with_data_the_gallery_shows_questions_and_pictures() -> None:
    page = filled()
    questions = page.text("flip", "question")
    known = load(everything(), {"scienceqa": "mini", "mmbench": "mini"})
    flips = [(t.definition.task, f.id) for t in everything().tasks for c in t.changes
             for f in c.flips]  # fmt: skip
    assert len({task for task, _ in flips}) == 2
    assert all(" ".join(known[flip].text.split()) in questions for flip in flips)
    assert len(page.values("src")) == sum(known[flip].image is not None for flip in flips)
    assert not page.text("fill")
    some = {key: question for key, question in known.items() if key[0] == "mmbench"}
    assert Page(render(everything(), gallery=some)).text("fill").count("Ids and letters only") == 1
    assert bare().text("fill").count("Ids and letters only") == 2


def picture(size: tuple[int, int]) -> bytes:
    stream = io.BytesIO()
    Image.effect_noise(size, 80).convert("RGB").save(stream, "PNG")
    return stream.getvalue()


def test_large_pictures_are_made_small() -> None:
    made = gallery.embed(picture((1000, 500)))
    assert made is not None
    assert (made.width, made.height) == (320, 160)
    assert made.uri.startswith("data:image/webp;base64,")  # noise: PNG is the larger one
    flat = io.BytesIO()
    Image.new("RGB", (64, 64)).save(flat, "PNG")
    tiny = gallery.embed(flat.getvalue())
    assert tiny is not None
    assert (tiny.width, tiny.small) == (64, True)


def test_a_picture_that_cannot_be_read_is_counted_and_said(tmp_path: Path) -> None:
    (tmp_path / "damaged.png").write_bytes(picture((9, 9))[:60])
    for image in (tmp_path / "absent.png", tmp_path / "damaged.png", b"no picture"):
        assert gallery.embed(image) is None
    known = {
        key: question.model_copy(update={"image": tmp_path / "absent.png"})
        for key, question in load(everything(), {"scienceqa": "mini"}).items()
    }
    page = Page(render(everything(), gallery=known))
    assert "Its picture cannot be read" in page.text("flip", "missing")
    assert f"; {KEPT} pictures missing" in page.text("wall", "about")


def test_the_gallery_is_of_the_data_that_were_answered() -> None:
    case = everything()
    known = load(case, {"scienceqa": "mini", "mmbench": "mini", "other": "mini"})
    ids = {(t.definition.task, f.id) for t in case.tasks for c in t.changes for f in c.flips}
    assert known.keys() == ids
    assert all(known[key].id == key[1] for key in ids)

    def spoilt(**update: str) -> Comparison:
        task = case.tasks[0]
        change = task.changes[-1]
        flip = change.flips[0].model_copy(update=update)
        changes = (change.model_copy(update={"flips": (flip,)}),)
        return case.model_copy(update={"tasks": (task.model_copy(update={"changes": changes}),)})

    with pytest.raises(ArtifactError, match=r"mini does not hold .*: 99 of scienceqa is missing"):
        load(spoilt(id="99"), {"scienceqa": "mini"})
    gold = "A" if case.tasks[0].changes[-1].flips[0].gold != "A" else "B"
    with pytest.raises(ArtifactError, match=r"has the answer . there"):
        load(spoilt(gold=gold), {"scienceqa": "mini"})


def test_built_in_questions_need_no_path() -> None:
    """They are told by their digests: of all, or of as many as were asked."""
    case = everything()
    assert load(case, {}) == load(case, {"scienceqa": "mini", "mmbench": "mini"})
    task = case.tasks[0]

    def asked(n: int, *digests: str) -> str | None:
        data = {"scienceqa:test": digests}
        definition = task.definition.model_copy(update={"n": n, "data": data})
        return built_in(task.model_copy(update={"definition": definition}))

    questions = selector.load(selector.parse("scienceqa:test"), {"scienceqa": "mini"})
    whole, part = (selector.digest(selector.limit(questions, n)) for n in (2400, 600))
    text = selector.load(selector.parse("scienceqa:test"), {"scienceqa": "mini-text"})
    assert asked(2400, whole) == asked(600, part) == "mini"
    assert asked(600, selector.digest(text)) == "mini-text"
    assert asked(599, part) is asked(2400, "0" * 64) is asked(2400, whole, part) is None
    assert built_in(task.model_copy(update={"changes": ()})) is None  # nothing to show


def test_flips_without_scores_say_how_they_are_sorted() -> None:
    case = everything()
    assert not filled().text("order")

    def unscored(task: TaskComparison, kept: int) -> TaskComparison:
        """The task without margins but of the first `kept` flips of a pair."""
        none = {"margin": None, "reference_margin": None}
        changes = [
            change.model_copy(
                update={
                    "divergence": None,
                    "flips": tuple(flip if k < kept else flip.model_copy(update=none)
                                   for k, flip in enumerate(change.flips)),
                }
            )
            for change in task.changes
        ]  # fmt: skip
        return task.model_copy(update={"changes": tuple(changes)})

    for kept, told in ((0, "without margins they stand in the order of ids"), (1, "come last")):
        tasks = tuple(unscored(task, kept) for task in case.tasks)
        page = Page(render(case.model_copy(update={"tasks": tasks})))
        walls = [kind for _, kind in page.elements if "wall" in (kind.get("class") or "").split()]
        assert page.text("order").count(told) > 0
        assert page.text("order").count("order of ids") == len(walls)
        assert bool(page.text("margins")) == bool(kept)
        assert "so that KL and margins are not known" in page.text("note")


def test_figures_share_a_page() -> None:
    body = '<g id="a"><use xlink:href="#b" xmlns:xlink="http://www.w3.org/1999/xlink"/></g>' \
           '<path id="b" style="fill: #787878" clip-path="url(#a)" d="M0 0"/>'  # fmt: skip
    figures = {f"figures/{k}.svg": SVG.format(body) for k in ("pareto", "accuracy-mmbench")}
    page = Page(render(everything(), figures=figures))
    ids = Counter(page.values("id"))
    assert {"pareto-a", "pareto-b", "accuracy-mmbench-a"} <= ids.keys()
    assert max(ids.values()) == 1
    assert "#pareto-b" in page.values("xlink:href")
    assert "url(#pareto-a)" in page.values("clip-path")
    assert {"fill: currentColor"} <= set(page.values("style"))
    titles = [attrs for tag, attrs in page.elements if tag == "svg" and "aria-labelledby" in attrs]
    assert [svg["role"] for svg in titles] == ["img", "img"]
    text = page.text("figcaption")
    assert "Accuracy of every arm with its interval: mmbench" in text


@pytest.mark.parametrize(
    "body",
    [
        '<use xlink:href="https://x.org/a.svg" xmlns:xlink="http://www.w3.org/1999/xlink"/>',
        '<path onclick="alert(1)" d="M0 0"/>',
        '<path fill="url(https://x.org/a)" d="M0 0"/>',
        "<g>",
    ],
)
def test_a_figure_that_is_not_self_contained_is_refused(body: str) -> None:
    with pytest.raises(ArtifactError):
        drawings.inlined(SVG.format(body), "bad", "Bad")
    kept = drawings.inlined(SVG.format("<script>alert(1)</script><metadata/>"), "m", "M")
    assert "alert" not in kept
    assert "metadata" not in kept


def test_numbers_are_sorted_by_what_they_mean() -> None:
    rows = [
        {"arm": name, "time": time, "diff": diff, "text": text}
        for name, time, diff, text in (
            ("a", "90 s", "+0.6 [-0.3, +1.5]", "4 bits g128"),
            ("b", "2 min", "<0.001", "2 of 3"),
            ("c", "1.5 h", "-", "-"),
        )
    ]
    table = cells.table("t", rows)
    assert table is not None
    assert [[cell.value for cell in row] for row in table.rows] == [
        ["", "90", "0.6", ""],
        ["", "120", "0.001", ""],
        ["", "5400", "", ""],
    ]
    assert [cell.kind.split()[0] for cell in table.head] == ["text", "number", "number", "text"]
    assert cells.table("none", []) is None


def test_rows_that_belong_to_the_one_above_are_not_sorted() -> None:
    rows = [{"arm": arm, "x": "1"} for arm in ("a", "", "")]
    table = cells.table("t", rows)
    assert table is not None
    assert not table.sortable


def test_intervals_are_drawn_on_one_scale() -> None:
    scale = drawings.difference_scale([(-0.02, 0.01), (0.0, 0.06)], 0.01)
    assert scale.place(0, 120) == 60
    assert scale.place(0.06, 120) > scale.place(0.01, 120) > 60 > scale.place(-0.02, 120)
    assert drawings.accuracy_scale([BASE, GPTQ]) == (0.5, pytest.approx(0.7))


def test_agreement_is_shaded_from_its_lowest_to_all() -> None:
    agreement = everything().tasks[0].agreement
    assert agreement is not None
    table = cells.agreement_table(agreement)
    shades = {cell.kind.rpartition("-")[2] for row in table.rows for cell in row[1:]}
    assert {"0", "9"} <= shades
    assert all(table.rows[k][k + 1].kind.endswith("-9") for k in range(len(table.rows)))


def test_prose_knows_its_few_marks_and_nothing_else() -> None:
    text = "**a `b`** <i>\n\n- one\n- [two](https://x.org)\n- [three](javascript:alert)\n\nend"
    assert prose(text) == (
        "<p><strong>a <code>b</code></strong> &lt;i&gt;</p>\n<ul><li>one</li><li>"
        '<a href="https://x.org">two</a></li><li>[three](javascript:alert)</li></ul>\n<p>end</p>'
    )


def test_the_templates_come_with_the_package() -> None:
    root = Path(__file__).resolve().parents[2]
    told = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))
    assert "templates/*" in told["tool"]["setuptools"]["package-data"]["qatbench.report"]


def test_a_part_of_many_rows_is_lengthy() -> None:
    task = everything().tasks[0]
    long = {part.title: part.lengthy for part in sections(everything(), task)}
    assert long["Seed by seed"] is False
    rows = [["a"]] * (LENGTHY + 1)
    many = cells.table("many", [{"arm": row[0]} for row in rows])
    few = cells.table("few", [{"arm": row[0]} for row in rows[1:]])
    assert Section("t", "a", [many]).lengthy
    assert not Section("t", "a", [few, None]).lengthy
    assert Section("t", "a", [few, few]).lengthy
