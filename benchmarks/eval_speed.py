"""Questions a second of `eval` against a loop of one question at a time, and what batching changes.

The loop is how lmms-eval runs a model by default: batch 1, greedy, at most 8 new tokens, the letter
read from the text. Both sides encode pictures and extract answers, on the same loaded model, one
after the other in one run; ratios are the loop's seconds over ours. Beside them:

  flips      options chosen at batch 1 that differ in a full batch, each with its margin (best score
             minus second best, nats a token), and the largest difference of a score: the noise
             floor of the dtype. In fp32 there must be none.
             Of llava also for questions of 609 to 656 tokens, which are padded in a batch.
  differing  written answers that differ from the loop's, each with the gap between the two best
             logits where the texts part.

mini   the shipped mini/student on the drawn benchmark, pictures included; any CPU.
llava  LLaVA-1.5-7B's shape, random bf16 weights, 656 tokens a question, 576 of them visual; GPU.

    python benchmarks/eval_speed.py mini|llava [--limit 300] [--dtype float32] [--json FILE]
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "benchmarks")]

from kept import show  # noqa: E402

from qatbench.records import Prediction, Question  # noqa: E402
from qatbench.stages.answering import Batching, answer_all, found_tokens  # noqa: E402
from qatbench.stages.common import silent  # noqa: E402
from qatbench.tasks import protocols, selector  # noqa: E402
from qatbench.vlm import load as models  # noqa: E402
from qatbench.vlm.answer import Mode  # noqa: E402
from qatbench.vlm.batch import Encoded, Encoder, arithmetic, pixel_batch  # noqa: E402
from qatbench.vlm.load import Loaded  # noqa: E402

PROTOCOL, NEW, TOKENS = "grace-sqa", 8, 656  # that protocol writes at most 8 tokens
SPREAD = 48  # of the lengths of questions that are not alike
SIDE = 336


def loop(loaded: Loaded, questions: Sequence[Question]) -> list[tuple[str | None, list[int]]]:
    """One question at a time through the plain model's generate: (letter, tokens)."""
    how, found = protocols.get(PROTOCOL), []
    for question in questions:
        prompt = Encoder(loaded).prompt(how.prompt(question), question.image)
        inputs = prompt.inputs() | {"attention_mask": torch.ones(1, len(prompt)).long()}
        inputs |= pixel_batch([prompt], loaded.device, arithmetic(loaded.model))
        inputs = {key: value.to(loaded.device) for key, value in inputs.items()}
        with torch.inference_mode():
            out = loaded.model.generate(
                **inputs, max_new_tokens=NEW, do_sample=False, temperature=None, top_p=None,
                top_k=None, repetition_penalty=1.0, pad_token_id=loaded.tokenizer.pad_token_id or 0,
            )  # fmt: skip
        tokens = out[0, len(prompt) :].tolist()
        text = loaded.tokenizer.decode(tokens, skip_special_tokens=True)
        found.append((how.extract(text.strip(), question.options), tokens))
    return found


def ours(
    loaded: Loaded, questions: Sequence[Question], mode: Mode, batching: Batching
) -> list[Prediction]:
    """The questions through the evaluation's own engine."""
    task = questions[0].task
    with tempfile.TemporaryDirectory() as scratch:
        partial = Path(scratch) / "predictions.jsonl"
        named = {task: PROTOCOL}
        return answer_all(loaded, {task: questions}, named, mode, partial, silent, batching).rows


def timed(what: Any, loaded: Loaded) -> tuple[Any, float]:
    """(result, seconds)."""
    started = time.perf_counter()
    found = what()
    if loaded.device.type == "cuda":
        torch.cuda.synchronize()
    return found, time.perf_counter() - started


def margin(row: Prediction) -> float:
    """Best score minus second best."""
    best, second, *_ = sorted((row.scores or {}).values(), reverse=True)
    return round(best - second, 6)


def flips(alone: Sequence[Prediction], batched: Sequence[Prediction]) -> dict[str, Any]:
    """Options chosen that differ, and the largest difference of a score."""
    pairs = list(zip(alone, batched, strict=True))
    gaps = [abs((a.scores or {})[k] - (b.scores or {})[k]) for a, b in pairs for k in a.choices]
    changed = [{"id": a.id, "margin": margin(a)} for a, b in pairs if a.chosen != b.chosen]
    return {"flips": changed, "largest_score_difference": round(max(gaps), 6)}


@torch.inference_mode()
def gap(loaded: Loaded, prompt: Encoded, before: Sequence[int]) -> float:
    """Best logit minus second best after a prompt and the tokens that both texts share."""
    pixels = pixel_batch([prompt], loaded.device, arithmetic(loaded.model))
    inputs = prompt.inputs(list(before)) | pixels
    inputs = {key: value.to(loaded.device) for key, value in inputs.items()}
    best, second = loaded.model(**inputs).logits[0, -1].float().topk(2).values.tolist()
    return round(best - second, 4)


def differing(
    loaded: Loaded,
    questions: Sequence[Question],
    plain: Sequence[tuple[str | None, list[int]]],
    rows: Sequence[Prediction],
) -> list[dict[str, Any]]:
    """Questions whose written answers differ."""
    found = []
    for question, (letter, tokens), row in zip(questions, plain, rows, strict=True):
        text = loaded.tokenizer.decode(tokens, skip_special_tokens=True).strip()
        if text == row.raw:
            continue
        shared = 0  # tokens whose text ours begins with too
        while shared < len(tokens) and str(row.raw).startswith(
            loaded.tokenizer.decode(tokens[: shared + 1], skip_special_tokens=True).strip()
        ):
            shared += 1
        prompt = Encoder(loaded).prompt(protocols.get(PROTOCOL).prompt(question), question.image)
        found.append({"id": question.id, "letter_differs": letter != row.chosen,
                      "gap": gap(loaded, prompt, tokens[:shared])})  # fmt: skip
    return found


def shaped(loaded: Loaded, lengths: Sequence[int]) -> list[Question]:
    """A question of each length in tokens, with a picture of its own."""
    import tiny

    rng, made = random.Random(0), []
    with tempfile.TemporaryDirectory() as scratch:
        folder = tiny.save_questions(Path(scratch) / "data", text=0, images=len(lengths))
        pictured = [q for q in selector.load(selector.parse("scienceqa:train"),
                                             {"scienceqa": str(folder)}) if q.image]  # fmt: skip
        for question in pictured[: len(lengths)]:
            made.append(question.model_copy(update={"image": Path(question.image).read_bytes()}))
    how = protocols.get(PROTOCOL)
    for at, question in enumerate(made):
        words: list[str] = []
        while True:
            longer = question.model_copy(update={"text": " ".join([*words, question.text])})
            missing = lengths[at] - len(Encoder(loaded).prompt(how.prompt(longer), longer.image))
            if missing <= 0:
                break
            words += rng.choices(["red", "blue", "the", "of", "a"], k=max(1, missing // 4))
        made[at] = longer
    return made


def compare(loaded: Loaded, questions: Sequence[Question], tokens: int) -> dict[str, Any]:
    """The loop, option mode and generate mode, and what changes between them."""
    few = list(questions[:4])
    loop(loaded, few)  # warm-up of each
    for mode in ("options", "generate"):
        ours(loaded, list(questions[: 2 * tokens // TOKENS]), mode, Batching(tokens=tokens))  # type: ignore[arg-type]
    plain, seconds = timed(lambda: loop(loaded, questions), loaded)
    found: dict[str, Any] = {"questions": len(questions), "loop_questions_per_second":
                             round(len(questions) / seconds, 3)}  # fmt: skip
    batched = {}
    for mode in ("options", "generate"):
        batched[mode], took = timed(
            lambda mode=mode: ours(loaded, questions, mode, Batching(tokens=tokens)), loaded
        )
        found[mode] = {"questions_per_second": round(len(questions) / took, 3),
                       "ratio": round(seconds / took, 2)}  # fmt: skip
    alone = ours(loaded, questions, "options", Batching(size=1))
    found["options"] |= flips(alone, batched["options"])
    found["options_at_32"] = flips(alone, ours(loaded, questions, "options", Batching(size=32)))
    found["generate"]["differing"] = differing(loaded, questions, plain, batched["generate"])
    return found


def main() -> None:
    """Measure and print JSON."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("what", choices=("mini", "llava"))
    parser.add_argument("--limit", type=int, default=300)
    parser.add_argument("--dtype", help="default: float32 for mini, bfloat16 for llava")
    parser.add_argument("--tiny", action="store_true", help="llava in small sizes, on any CPU")
    parser.add_argument("--json", type=Path, help="file for the figures")
    given = parser.parse_args()
    cuda = torch.cuda.is_available()
    device = "cuda" if cuda else "cpu"
    if given.what == "llava" and not (cuda or given.tiny):
        parser.error("true sizes need a CUDA device; --tiny runs anywhere")
    name = given.dtype or ("float32" if given.what == "mini" or given.tiny else "bfloat16")
    dtype = getattr(torch, name)
    with tempfile.TemporaryDirectory() as scratch:
        if given.what == "mini":
            folder = models.find("mini/student")
        else:
            import real_shapes

            folder = real_shapes.build("llava", Path(scratch) / "m", given.tiny, None, device)
        tokens = found_tokens(folder, device, dtype, "generate")
        loaded = models.load(folder, device=device, dtype=dtype)
    if given.what == "mini":
        chosen = selector.parse("scienceqa:test:image")
        questions = selector.limit(selector.load(chosen, {"scienceqa": "mini"}), given.limit, 0)
    else:
        questions = shaped(loaded, [TOKENS] * given.limit)
    found = {"model": given.what, "dtype": name, "tokens_a_batch": tokens,
             "device": torch.cuda.get_device_name() if cuda else "cpu",
             "threads": torch.get_num_threads(), "torch": torch.__version__}  # fmt: skip
    found |= compare(loaded, questions, tokens)
    if given.what == "llava":
        rng = random.Random(1)
        uneven = shaped(loaded, [TOKENS - rng.randrange(SPREAD) for _ in range(given.limit)])
        alone, batched = (
            ours(loaded, uneven, "options", how)
            for how in (Batching(size=1), Batching(tokens=tokens))
        )
        found["options_uneven"] = flips(alone, batched)
    show(found, given.json)


if __name__ == "__main__":
    main()
