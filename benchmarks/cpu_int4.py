"""Questions a second on a CPU: INT4 by each kernel and dtype against 16-bit weights in fp32.

smollm2-135m and its INT4 checkpoint (RTN, group size 64), asked by `eval` in option mode, in turns.
Ratios are of medians over fp32's; `fastest` of each round's best. Beside them:

  scores    of the same questions: options chosen that differ from those of a reference (16-bit
            weights, INT4 weights; both dense in fp32), each with its margin there, and the largest
            difference of a score. What bf16 changes at 16 bits is the noise of the dtype.
  decoding  tokens a second at batch 1 by both engines, each with the kernel it takes by itself:
            transformers the library's, this project's what `auto` picks; the JSON names it.

`library` is the kernel that plain transformers and gptqmodel pick; `dense` multiplies unpacked
weights. Other work on the machine changes the figures: the JSON holds the load before and after.

    qatbench quantize smollm2-135m --method rtn --bits 4 --group-size 64 --out CHECKPOINT
    python benchmarks/cpu_int4.py CHECKPOINT [--rounds 5] [--json results/cpu-int4/smollm2.json]
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

sys.path[:0] = [str(Path(__file__).parent)]

from eval_speed import flips  # noqa: E402
from kept import show  # noqa: E402

from qatbench.engine import pick  # noqa: E402
from qatbench.records import Prediction, Question  # noqa: E402
from qatbench.stages.answering import (  # noqa: E402
    ON_CPU,
    OPTIONS_ON_CPU,
    Batching,
    answer_all,
)
from qatbench.stages.common import silent  # noqa: E402
from qatbench.stages.speed_prompts import prompts  # noqa: E402
from qatbench.tasks import selector  # noqa: E402
from qatbench.vlm import load as models  # noqa: E402
from qatbench.vlm.batch import Encoder  # noqa: E402
from qatbench.vlm.load import Loaded, ModelFolder  # noqa: E402

PROTOCOL = "qatbench"
TOKENS = (ON_CPU, OPTIONS_ON_CPU)  # padded, a batch: what was the default, and what is
CONTEXT, NEW = 64, 16  # tokens of the decoding measurement
BASE = "fp32 dense"
WAYS = {
    # name: (INT4, dtype, kernel)
    BASE: (False, torch.float32, "dense"),
    "bf16 dense": (False, torch.bfloat16, "dense"),
    "int4 fp32 library": (True, torch.float32, "library"),
    "int4 bf16 library": (True, torch.bfloat16, "library"),
    "int4 fp32 dense": (True, torch.float32, "dense"),
    "int4 bf16 dense": (True, torch.bfloat16, "dense"),
}


def asked(loaded: Loaded, questions: Sequence[Question], tokens: int) -> list[Prediction]:
    """The questions as `eval` puts them, in batches of so many padded tokens."""
    task = questions[0].task
    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch) / "predictions.jsonl"
        named, batching = {task: PROTOCOL}, Batching(tokens=tokens)
        return answer_all(loaded, {task: questions}, named, "options", file, silent, batching).rows


def spread(rates: Sequence[float]) -> dict[str, Any]:
    """Median, slowest and fastest round."""
    return {"median": round(statistics.median(rates), 2), "slowest": round(min(rates), 2),
            "fastest": round(max(rates), 2)}  # fmt: skip


def speeds(
    loaded: Mapping[str, Loaded], questions: Sequence[Question], rounds: int, tokens: int
) -> dict[str, dict[str, Any]]:
    """Questions a second of each way, in turns; the first round warms up."""
    rates: dict[str, list[float]] = {name: [] for name in loaded}
    for turn in range(rounds + 1):
        for name, model in loaded.items():
            started = time.perf_counter()
            asked(model, questions, tokens)
            if turn:
                rates[name].append(len(questions) / (time.perf_counter() - started))
            print(turn, name, file=sys.stderr)
    base = rates[BASE]
    return {
        name: {
            "kernel": models.kernel_name(loaded[name]),
            "questions_per_second": spread(found),
            "ratio": round(statistics.median(found) / statistics.median(base), 2),
            "ratio_fastest": round(max(found) / max(base), 2),
        }
        for name, found in rates.items()
    }


def differences(loaded: Mapping[str, Loaded], questions: Sequence[Question]) -> dict[str, Any]:
    """What each way changes against its weights, dense in fp32."""
    rows = {name: asked(model, questions, ON_CPU) for name, model in loaded.items()}
    found = {"questions": len(questions)}
    for name, (int4, _, _) in WAYS.items():
        reference = "int4 fp32 dense" if int4 else BASE
        if name != reference:
            found[name] = {"against": reference, **flips(rows[reference], rows[name])}
    return found


def decoding(checkpoint: ModelFolder, base: ModelFolder, rounds: int) -> dict[str, Any]:
    """Tokens a second at batch 1, without the prompt's."""
    runners = {
        f"{engine}, {'int4' if int4 else '16 bits'} {str(dtype).removeprefix('torch.')}": pick.load(
            engine, checkpoint if int4 else base, device="cpu", dtype=dtype
        )
        for engine in pick.ENGINES
        for int4 in (False, True)
        for dtype in (torch.float32, torch.bfloat16)
    }
    rates: dict[str, list[float]] = {name: [] for name in runners}
    for turn in range(rounds + 1):
        for name, runner in runners.items():
            given = prompts(Encoder(runner.loaded), 1, CONTEXT, image="none", seed=0)
            started = runner.start(given, NEW + 1)
            begun = time.perf_counter()
            runner.step(started, NEW)
            if turn:
                rates[name].append(NEW / (time.perf_counter() - begun))
            print(turn, name, file=sys.stderr)
    return {
        name: {"kernel": runners[name].kernel, "tokens_per_second": spread(found)}
        for name, found in rates.items()
    }


def main() -> None:
    """Measure and print JSON."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("checkpoint", type=Path, help="INT4, made of smollm2-135m")
    parser.add_argument("--questions", type=int, default=32, help="a round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--compare", type=int, default=300, help="questions of `scores`; 0: none")
    parser.add_argument("--json", type=Path, help="file for the figures")
    given = parser.parse_args()
    before = [round(value, 2) for value in os.getloadavg()]
    base, checkpoint = models.find("smollm2-135m"), models.find(str(given.checkpoint))
    loaded = {
        name: models.load(checkpoint if int4 else base, device="cpu", dtype=dtype, kernel=kernel)
        for name, (int4, dtype, kernel) in WAYS.items()
    }
    every = selector.load(selector.parse("scienceqa:test:text"), {"scienceqa": "mini-text"})
    found = {
        "model": "smollm2-135m",
        "quantization": {k: checkpoint.quantization[k] for k in ("bits", "group_size")},
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "questions_a_round": given.questions,
        "rounds": given.rounds,
        "load_before": before,
    }
    questions = selector.limit(every, given.questions, 0)
    for tokens in TOKENS:
        named = f"option_mode, {tokens} tokens a batch"
        found[named] = speeds(loaded, questions, given.rounds, tokens)
        found[named]["load_after"] = [round(value, 2) for value in os.getloadavg()]
    found["decoding"] = decoding(checkpoint, base, given.rounds)
    if given.compare:
        found["scores"] = differences(loaded, selector.limit(every, given.compare, 0))
    show(found | {"load_after": [round(value, 2) for value in os.getloadavg()]}, given.json)


if __name__ == "__main__":
    main()
