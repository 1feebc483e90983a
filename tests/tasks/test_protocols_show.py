"""`qatbench protocols`: every protocol is laid open, on a question that is in no data set."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from qatbench.cli import main
from qatbench.tasks import protocols, protocols_show, selector

ROOT = Path(__file__).resolve().parents[2]


def printed(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    with pytest.raises(SystemExit) as ended:
        main(["protocols", *arguments])
    assert ended.value.code in (0, None)
    return capsys.readouterr().out


def test_the_list_has_every_name_with_what_it_does(capsys: pytest.CaptureFixture[str]) -> None:
    value = json.loads(printed(capsys, "--json"))
    rows: list[dict[str, Any]] = value["protocols"]
    assert [row["name"] for row in rows] == protocols.names()
    assert value["recommended"] == rows[0]["name"] == "qatbench"
    for row in rows:
        protocol = protocols.get(row["name"])
        assert (row["max_new_tokens"], row["circular"]) == (
            protocol.max_new_tokens,
            protocol.circular,
        )
        assert set(row["tasks"]) <= set(selector.TASKS)
        assert row["tasks"]
        assert row["unparsed"]
    drawn = {
        row["name"] for row in rows if "random" in row["unparsed"] or "draw" in row["unparsed"]
    }
    assert drawn == {
        "scienceqa-official", "scienceqa-official-breakdown", "lmms-mmbench-openai",
        "lmms-mmbench-openai(no API)",
    }  # fmt: skip
    text = printed(capsys)
    assert all(name in text for name in protocols.names())


@pytest.mark.parametrize("name", [*protocols.names(), "vlmevalkit-exact@2024-03-via-tsv"])
def test_one_in_full(capsys: pytest.CaptureFixture[str], name: str) -> None:
    value, protocol = json.loads(printed(capsys, name, "--json")), protocols.get(name)
    assert value["prompt"] == protocol.prompt(protocols_show.EXAMPLE)
    assert (value["chat"] is None) == (protocol.chat is None)
    read = {one["response"]: one["letter"] for one in value["extracted"]}
    assert read == {text: protocol.extract(text, value["options"]) for text in read}
    assert len(set(read.values())) > 1
    text = printed(capsys, name)
    assert all(f"  | {line}" in text for line in value["prompt"].split("\n"))
    assert protocol.unparsed in text


def test_the_recommended_one_gives_a_reason_for_each_choice() -> None:
    assert len(protocols.get("qatbench").choices) >= 5
    text = "\n".join(protocols_show.lines(protocols_show.in_full(protocols.get("qatbench"))))
    assert all(reason in text for reason in protocols.get("qatbench").choices)


def test_the_page_names_every_protocol() -> None:
    page = (ROOT / "docs" / "protocols.md").read_text(encoding="utf-8")
    assert [name for name in protocols.names() if f"`{name}`" not in page] == []
