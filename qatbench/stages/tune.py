"""tune: choose hyper-parameters by cross-validation on training data; no test question is read.

Every candidate of an arm is trained on all folds but one and asked the questions of that one, in
the form of the evaluation, on the weights as they would be packed. A taught arm's teacher is
trained on the same folds with its own best candidate, so no fold leaks through the teacher.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from qatbench import store
from qatbench.errors import UsageError
from qatbench.recipe import ArmRef, Recipe, TuningSpec
from qatbench.records import Prediction, Question
from qatbench.stages.answering import answer_all
from qatbench.stages.common import Progress
from qatbench.stages.plan import HOW, train_settings
from qatbench.stages.train import TrainingRun, TrainRequest, train
from qatbench.stages.train_settings import TrainSettings
from qatbench.stages.workers import Job
from qatbench.tasks import selector
from qatbench.vlm import load as models
from qatbench.vlm.load import ModelFolder


def tune(
    recipe: Recipe,
    results: Path,
    paths: Mapping[str, str],
    *,
    arms: Sequence[str] | None,
    folds: Sequence[int] | None,
    device: str | None,
    progress: Progress,
) -> dict[str, Any]:
    """Cross-validate what is missing; returns and writes the summary (tuning.json).

    Args:
        recipe: with a `tuning` section.
        results: results folder.
        paths: where data lies, by task.
        arms: only these, default all; several processes can share the work.
        folds: only these, default all.
        device: torch device name.
        progress: callback.

    Raises: UsageError for an arm or fold that is not there.
    """
    tuning = recipe.tuning
    if tuning is None:
        raise UsageError(f"recipe {recipe.name} has no `tuning` section")
    wanted = list(arms or tuning.candidates)
    for name in wanted:
        if name not in tuning.candidates or name not in recipe.arms:
            raise UsageError(f"no candidates for arm {name!r}", hint="see the `tuning` section")
    chosen = selector.parse(tuning.data)
    rows = selector.load(chosen, dict(recipe.data.paths) | dict(paths))
    parts = selector.folds(rows, tuning.folds, recipe.seed)
    if folds and max(folds) >= tuning.folds:
        raise UsageError(f"there are {tuning.folds} folds, 0 to {tuning.folds - 1}")
    bench = _Bench(recipe, results / recipe.name / "tuning", parts, device, progress)
    for name in wanted:
        for fold in folds or range(tuning.folds):
            for candidate in tuning.candidates[name]:
                bench.measure(name, candidate, fold)
    summary = summarize(recipe, tuning, bench.root, selector.digest(rows))
    store.write_json(results / recipe.name / "tuning.json", summary)
    return summary


def jobs_of(recipe: Recipe, command: Sequence[str]) -> list[Job]:
    """An arm and a fold a job; a taught arm waits for its teacher's arm on every fold."""
    tuning = recipe.tuning
    if tuning is None:
        raise UsageError(f"recipe {recipe.name} has no `tuning` section")
    jobs = []
    for name in tuning.candidates:
        needs: frozenset[str] = frozenset()
        teacher = recipe.teacher_of(recipe.arms[name])
        if isinstance(teacher, ArmRef):
            needs = frozenset(f"{teacher.arm}-fold-{i}" for i in range(tuning.folds))
        for fold in range(tuning.folds):
            part = (*command, "--arm", name, "--fold", str(fold))
            jobs.append(Job(f"{name}-fold-{fold}", part, needs))
    return jobs


def summarize(recipe: Recipe, tuning: TuningSpec, root: Path, digest: str) -> dict[str, Any]:
    """All results there are, and the best candidate of each arm whose folds are complete."""
    rows = []
    for name, candidates in tuning.candidates.items():
        for candidate in candidates:
            found = [_result(root, name, candidate, fold) for fold in range(tuning.folds)]
            done = [one for one in found if one is not None]
            n = sum(one["n"] for one in done)
            rows.append(
                {
                    "arm": name,
                    "candidate": json.dumps(candidate),
                    "accuracy": round(sum(o["right"] for o in done) / n, 5) if n else None,
                    "loss": round(sum(o["loss"] * o["n"] for o in done) / n, 5) if n else None,
                    "n": n,
                    "folds": found,
                }
            )
    return {
        "recipe": recipe.name,
        "selector": tuning.data,
        "data": digest,
        "rule": "highest accuracy over all folds; ties by the lower loss",
        "best": {name: best(root, tuning, name) for name in tuning.candidates},
        "candidates": rows,
    }


def best(root: Path, tuning: TuningSpec, name: str) -> dict[str, Any] | None:
    """The best candidate of an arm; None while a fold is missing."""
    scored = []
    for candidate in tuning.candidates[name]:
        found = [_result(root, name, candidate, fold) for fold in range(tuning.folds)]
        if any(one is None for one in found):
            return None
        done = [one for one in found if one is not None]
        right = sum(one["right"] for one in done)
        scored.append((-right, sum(o["loss"] * o["n"] for o in done), candidate))
    return min(scored, key=lambda item: item[:2])[2]


def _folder(root: Path, name: str, candidate: Mapping[str, Any], fold: int) -> Path:
    return root / name / store.fingerprint(candidate) / f"fold-{fold}"


def _result(
    root: Path, name: str, candidate: Mapping[str, Any], fold: int
) -> dict[str, Any] | None:
    file = _folder(root, name, candidate, fold) / "result.json"
    return store.read_json(file) if file.exists() else None


class _Bench:
    """Trains and scores candidates on folds."""

    def __init__(
        self,
        recipe: Recipe,
        root: Path,
        parts: Sequence[Sequence[Question]],
        device: str | None,
        progress: Progress,
    ) -> None:
        self.recipe, self.root, self.parts = recipe, root, parts
        self.device, self.progress = models.pick_device(device), progress
        self.student = models.find(recipe.student)

    def measure(self, name: str, candidate: dict[str, Any], fold: int) -> None:
        """Train one candidate on all other folds and score it on this one, unless it is done."""
        folder = _folder(self.root, name, candidate, fold)
        with store.locked(folder):
            if (folder / "result.json").exists():
                return
            scratch = folder / "work"
            shutil.rmtree(scratch, ignore_errors=True)
            scratch.mkdir(parents=True)
            run = TrainingRun(self._request(name, candidate, fold), self.device, scratch)
            run.fit(self._say(f"{name} {json.dumps(candidate)} fold {fold}"))
            rows = self._ask(run, fold, scratch)
            shutil.rmtree(scratch)
            scored = {"n": len(rows), "right": sum(r.right for r in rows), "loss": _loss(rows)}
            facts = {"arm": name, "candidate": candidate, "fold": fold}
            store.write_json(folder / "result.json", facts | scored | {"seconds": run.seconds})

    def _request(self, name: str, candidate: dict[str, Any], fold: int) -> TrainRequest:
        # Not from the arm's own values: those are what an earlier search has chosen.
        arm = self.recipe.arms[name].model_copy(update={"training": {}, "controller": None})
        settings = train_settings(self.recipe, arm, self.recipe.seed, **candidate)
        teacher = self._teacher(self.recipe.teacher_of(arm), fold)
        how = self.recipe.training_of(arm)
        return TrainRequest(
            settings, self.student, teacher, self._others(fold), self.device, settings.steps + 1,
            **{name: getattr(how, name) for name in HOW},
        )  # fmt: skip

    def _others(self, fold: int) -> list[Question]:
        return [q for i, part in enumerate(self.parts) if i != fold for q in part]

    def _teacher(self, teacher: str | ArmRef | None, fold: int) -> ModelFolder | None:
        """The teacher for a fold, trained without it."""
        tuning = self.recipe.tuning
        if not isinstance(teacher, ArmRef):
            return models.find(teacher) if teacher else None
        candidate = best(self.root, tuning, teacher.arm) if tuning else None
        if candidate is None:
            raise UsageError(
                f"tune arm {teacher.arm!r} first, on every fold", hint="it teaches the others"
            )
        settings: TrainSettings = train_settings(
            self.recipe, self.recipe.arms[teacher.arm], self.recipe.seed, **candidate
        )
        out = self.root / "teachers" / f"fold-{fold}"
        request = TrainRequest(
            settings, self.student, None, self._others(fold), self.device, settings.steps + 1
        )
        with store.locked(out):
            train(request, out, resume=True, progress=self._say(f"teacher, fold {fold}"))
        return models.find(str(out))

    def _ask(self, run: TrainingRun, fold: int, scratch: Path) -> list[Prediction]:
        task = self.parts[fold][0].task
        protocol = {task: self.recipe.evaluation.protocol}
        run.student.model.eval()
        asked = {f"fold-{fold}": self.parts[fold]}
        partial = scratch / "predictions.jsonl"
        say = self._say("asking")
        return answer_all(run.student, asked, protocol, "options", partial, say).rows

    def _say(self, title: str) -> Progress:
        return lambda what, done, total: self.progress(f"{title}: {what}", done, total)


def _loss(rows: Sequence[Prediction]) -> float:
    """Mean of -log softmax(option scores)[gold], nats: a smooth companion of accuracy."""
    total = 0.0
    for row in rows:
        scores = row.scores or {}
        top = max(scores.values())
        mass = math.log(sum(math.exp(value - top) for value in scores.values()))
        total += mass + top - scores[str(row.gold)]
    return total / len(rows)
