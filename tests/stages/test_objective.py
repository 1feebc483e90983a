"""The loss of a step against the same terms worked out from whole logits."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import tiny
import torch

from qatbench.grace.losses import cross_entropy, gated_decoupled_kd, teacher_gate
from qatbench.stages.objective import Distillation, StepLoss, accumulate
from qatbench.tasks import selector
from qatbench.vlm import load as models
from qatbench.vlm.load import Loaded
from qatbench.vlm.training import MicroBatch, TrainingData

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> Loaded:
    folder = tiny.save_llava(tmp_path_factory.mktemp("student"))
    return models.load(models.find(str(folder)), device="cpu", dtype=torch.float32)


@pytest.fixture(scope="module")
def batch(student: Loaded, tmp_path_factory: pytest.TempPathFactory) -> MicroBatch:
    data = tiny.save_questions(tmp_path_factory.mktemp("data"))
    rows = selector.load(selector.parse("scienceqa:train"), {"scienceqa": str(data)})
    stream = TrainingData(student, rows, ("qatbench",), 0)
    return stream.collate(stream.step(0, 5), CPU, torch.float32)


@pytest.fixture(scope="module", params=[0, 8], ids=["same head", "padded head"])
def teacher(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Loaded:
    """Another model, whose head may have rows that no token of the student has."""
    folder = tiny.save_llava(tmp_path_factory.mktemp("teacher"), seed=1)
    loaded = models.load(models.find(str(folder)), device="cpu", dtype=torch.float32)
    head = loaded.model.get_output_embeddings()
    more = torch.randn(request.param, head.weight.shape[1], generator=torch.Generator())
    wide = torch.nn.Linear(head.weight.shape[1], len(head.weight) + request.param, bias=False)
    wide.weight = torch.nn.Parameter(torch.cat((head.weight, more)), requires_grad=False)
    loaded.model.set_output_embeddings(wide)
    return loaded


def logits(loaded: Loaded, batch: MicroBatch, where: torch.Tensor, width: int) -> torch.Tensor:
    with torch.no_grad():
        whole: torch.Tensor = loaded.model(**batch.inputs, use_cache=False).logits
    return whole.flatten(0, 1)[where, :width]


@pytest.mark.parametrize("tokens", ["supervised", "all"])
def test_a_step_is_its_terms_at_the_tokens_that_are_asked_for(
    tokens: Any, student: Loaded, teacher: Loaded, batch: MicroBatch
) -> None:
    how = Distillation(rcka=False, tokens=tokens)
    student.model.zero_grad()
    loss = accumulate(student.model, teacher.model, [batch], how, 0.7, 0.0, contextlib.nullcontext)
    width = student.model.get_output_embeddings().weight.shape[0]
    where, target = batch.where, batch.target
    ce = cross_entropy(logits(student, batch, where, width), target)
    if tokens == "all":
        where, target = batch.every, batch.every_target
    own, theirs = (logits(loaded, batch, where, width) for loaded in (student, teacher))
    assert isinstance(loss, StepLoss)
    assert loss.ce == pytest.approx(ce.item(), rel=1e-5)  # of answers only, in both
    assert loss.kd == pytest.approx(gated_decoupled_kd(own, theirs, target).item(), rel=1e-5)
    assert loss.gate == pytest.approx(teacher_gate(theirs).mean().item(), rel=1e-5)
    assert loss.tokens == len(batch.target) < len(batch.every)
