"""Training on two CPU processes: the losses, the weights and the resume of one.

Run as a script, this file is one of the processes of a launcher.
"""

from __future__ import annotations

import atexit
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from qatbench.errors import UsageError
from qatbench.stages import distributed
from qatbench.stages.common import silent
from qatbench.stages.distributed import World
from qatbench.stages.train import TrainRequest, train
from qatbench.stages.train_settings import ControllerSettings, TrainSettings
from qatbench.tasks import selector
from qatbench.vlm.load import Loaded, ModelFolder, find

SETTINGS = TrainSettings(
    method="grace", steps=4, group_size=32, batch_size=6, micro_batch_size=2, lr=1e-3,
    scale_lr=1e-2, omega_warmup=2, controller=ControllerSettings(target=0.1, rate=0.05),
)  # fmt: skip
TERMS = ("ce", "kd", "rcka", "gate", "beta", "omega", "tokens", "images")
KILLED = 3  # after this step, in the middle of what is saved


def asked(model: str, data: str) -> TrainRequest:
    rows = selector.load(selector.parse("scienceqa:train:all"), {"scienceqa": data})
    folder = find(model)
    return TrainRequest(SETTINGS, folder, folder, rows, "cpu", save_every=2)


def pairs(request: TrainRequest) -> TrainRequest:
    """A row for each process: of the pictures' rows and the others, one may have none."""
    settings = replace(request.settings, batch_size=2, steps=3)
    return replace(request, settings=settings)


def two_processes(job: dict[str, str], *flags: str) -> subprocess.CompletedProcess[str]:
    """Run this file in two processes."""
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "2"]
    launcher += ["--main_process_port", "0", *(flags or ("--multi_gpu",))]  # gloo without a GPU
    known = os.environ | {"OMP_NUM_THREADS": "1", "TORCHDYNAMO_DISABLE": "1"}
    return subprocess.run(
        [*launcher, __file__, json.dumps(job)],
        env=known, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip


def process(job: dict[str, str]) -> None:
    """One of the processes: train, and be killed where the job says so."""

    def progress(what: str, done: int, total: int) -> None:
        sys.stderr.write(f"[{os.environ['RANK']}] {what} {done}\n")
        if what.startswith("Training") and str(done) == job.get("kill"):
            os._exit(9)

    def shard(loaded: Loaded, world: World) -> None:
        before = sum(p.numel() for p in loaded.model.parameters())
        real(loaded, world)
        parts = (getattr(p, "_local_tensor", p) for p in loaded.model.parameters())
        share = sum(part.numel() for part in parts) / before
        sys.stderr.write(f"holds {share:.2f} of the weights\n")

    def ended() -> None:
        names = [(task / "comm").read_text() for task in Path("/proc/self/task").iterdir()]
        sys.stderr.write(f"threads of a group: {sum('gloo' in name for name in names)}\n")

    atexit.register(ended)  # before a group is joined, hence after it was left
    real, distributed.shard = distributed.shard, shard
    request = replace(asked(job["model"], job["data"]), checkpointing="checkpointing" in job)
    if "pairs" in job:
        request = pairs(request)
    record = train(request, Path(job["out"]), resume="resume" in job, progress=progress)
    sys.stdout.write(f"finished {record['fingerprint']}\n")


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "train.jsonl").read_text().splitlines()]


def assert_same_training(one: Path, other: Path) -> None:
    """Losses within 1e-5, weights within what rounding makes of them."""
    mine, theirs = lines(one), lines(other)
    assert [line["step"] for line in mine] == [line["step"] for line in theirs]
    assert len(mine) > 2
    for line, again in zip(mine, theirs, strict=True):
        for term in TERMS:
            # rcka is 1 - CKA, with CKA near 1 in fp32: a few roundings of 1
            bound = 5e-7 if term == "rcka" else 0.0
            assert line[term] == pytest.approx(again[term], rel=1e-5, abs=bound), term
        assert line["grad_norm"] == pytest.approx(again["grad_norm"], rel=1e-4)
    left, right = (load_file(f / "model.safetensors") for f in (one, other))
    assert left.keys() == right.keys()
    for name, value in left.items():
        if value.is_floating_point() and not name.endswith("scales"):
            # bf16: one step apart where the fp32 sums fall to both sides of a rounding
            torch.testing.assert_close(value, right[name], rtol=2**-7, atol=1e-4)
    words = [n for n in left if n.endswith("qweight")]
    fields = [((left[n] ^ right[n]) != 0).float().mean().item() for n in words]
    assert words
    assert max(fields) < 0.02  # words with a code that fell to the other side


@pytest.fixture(scope="session")
def alone(
    models: dict[str, ModelFolder], data: dict[str, str], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The same training by one process."""
    out = tmp_path_factory.mktemp("alone") / "out"
    request = asked(str(models["llava"].path), data["scienceqa"])
    train(request, out, resume=False, progress=silent)
    return out


@pytest.fixture
def job(models: dict[str, ModelFolder], data: dict[str, str], tmp_path: Path) -> dict[str, str]:
    return {
        "model": str(models["llava"].path),
        "data": data["scienceqa"],
        "out": str(tmp_path / "out"),
    }


@pytest.mark.slow
def test_two_processes_train_as_one_does(job: dict[str, str], alone: Path) -> None:
    done = two_processes(job)
    assert done.returncode == 0, done.stderr
    assert_same_training(Path(job["out"]), alone)
    assert len(set(done.stdout.split("finished ")[1:])) == 1  # both know the checkpoint
    assert done.stdout.count("finished") == 2
    assert "[0] Training" in done.stderr
    assert "[1]" not in done.stderr  # the other is silent
    assert done.stderr.count("threads of a group: 0") == 2, done.stderr
    assert not (Path(job["out"]) / "state").exists()


@pytest.mark.slow
def test_a_process_may_see_no_image(job: dict[str, str], tmp_path: Path) -> None:
    request = pairs(asked(job["model"], job["data"]))
    train(request, tmp_path / "alone", resume=False, progress=silent)
    assert {line["images"] for line in lines(tmp_path / "alone")} & {1}  # one of two rows
    done = two_processes(job | {"pairs": "yes"})
    assert done.returncode == 0, done.stderr
    assert_same_training(Path(job["out"]), tmp_path / "alone")


@pytest.mark.slow
def test_one_process_goes_on_where_two_were_killed(job: dict[str, str], alone: Path) -> None:
    killed = two_processes(job | {"kill": str(KILLED)})
    out = Path(job["out"])
    assert killed.returncode != 0
    assert not (out / "config.json").exists()
    assert [p.name for p in (out / "state").glob("step-*")] == ["step-0000002"]
    train(asked(job["model"], job["data"]), out, resume=True, progress=silent)
    assert_same_training(out, alone)


@pytest.mark.slow
def test_sharded_processes_train_as_one_does_and_resume(job: dict[str, str], alone: Path) -> None:
    fsdp = ("--use_fsdp", "--fsdp_version", "2")
    killed = two_processes(job | {"kill": str(KILLED)}, *fsdp)
    out = Path(job["out"])
    assert [p.name for p in (out / "state").glob("step-*")] == ["step-0000002"], killed.stderr
    done = two_processes(job | {"resume": "yes", "checkpointing": "yes"}, *fsdp)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("threads of a group: 0") == 2, done.stderr
    # four times, student and teacher of each process; the rest is embeddings, head and vision
    assert done.stderr.count("holds 0.7") == 4, done.stderr
    assert_same_training(out, alone)


@pytest.mark.slow
def test_a_refusal_of_the_first_process_ends_all(job: dict[str, str], alone: Path) -> None:
    done = two_processes(job | {"out": str(alone)})
    assert done.returncode != 0
    assert "already finished" in done.stderr


# --- without processes --------------------------------------------------------------------------


def test_every_row_is_in_one_share_and_lengths_are_spread() -> None:
    shares = [World(rank, 3).share(list(range(8))) for rank in range(3)]
    assert shares == [[0, 3, 6], [1, 4, 7], [2, 5]]


def test_steps_that_cannot_be_shared_are_refused() -> None:
    World(0, 4).check(4)
    World(0, 4).check(6)
    with pytest.raises(UsageError, match="batch size 3 for 4"):
        World(0, 4).check(3)
    with pytest.raises(UsageError, match="batch size 6 for 4"):
        World(0, 4, sharded=True).check(6)


def test_without_a_launcher_there_is_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    world = distributed.join(None)
    assert (world.rank, world.size, world.main) == (0, 1, True)
    assert world.sum([1.5, 2.0]) == [1.5, 2.0]
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UsageError, match="several processes"):
        distributed.join("cuda:1")
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_VERSION", "1")
    with pytest.raises(UsageError, match="version 1"):
        distributed.join("cpu")


def test_gradients_are_put_in_buckets_in_order() -> None:
    sizes = [3, 4, 9, 1, 1]
    parameters = [torch.nn.Parameter(torch.zeros(n)) for n in sizes]
    before = distributed.BUCKET
    try:
        distributed.BUCKET = 8
        found = [[len(p) for p in some] for some in distributed._buckets(parameters)]
    finally:
        distributed.BUCKET = before
    assert found == [[3, 4], [9], [1, 1]]


if __name__ == "__main__":
    process(json.loads(sys.argv[1]))
