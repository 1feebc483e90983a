"""ask: one question to several checkpoints, one loaded at a time, their answers side by side."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qatbench.engine import pick
from qatbench.engine.runner import Runner
from qatbench.errors import PrerequisiteError, UsageError
from qatbench.stages.common import Progress
from qatbench.stages.meter import Meter, is_out_of_memory
from qatbench.tasks.images import open_rgb
from qatbench.vlm import load as models
from qatbench.vlm.batch import Encoder
from qatbench.vlm.generate import ends
from qatbench.vlm.layout import most_positions
from qatbench.vlm.load import ModelFolder


@dataclass(frozen=True)
class Asked:
    """What is asked, and how it is answered."""

    question: str
    images: tuple[Path, ...] = ()
    max_new_tokens: int = 64
    engine: str = "transformers"
    device: str | None = None
    dtype: str | None = None


def ask(
    folders: Sequence[ModelFolder], asked: Asked, progress: Progress, meter: Meter | None = None
) -> dict[str, Any]:
    """Let every model answer greedily; each is loaded when its turn comes, and given up after.

    Returns: `question`, `images` (names), `engine`, `device`, `dtype` and `answers`: of each model
        `text`, `tokens` (ids, without what ended it), `ended` (or it ran into the limit),
        `prompt_tokens`, `load_seconds`, `first_token_seconds`, `seconds` (reading and telling),
        `tokens_per_second` (of decoding; None below two tokens), and `differs_at`: the number,
        from 0, of the first token that is not the first model's; None where all are equal, and
        where `same_tokenizer` is false: token ids of unlike vocabularies say nothing.
    Raises: UsageError for a text model and an image, or an answer beyond a model's positions;
        PrerequisiteError and ArtifactError for an image that is missing or damaged; what loading a
        model raises.
    """
    _check(folders, asked)
    device = models.pick_device(asked.device)
    dtype = models.pick_dtype(asked.dtype, device)
    meter = meter or Meter(device)
    answers: list[dict[str, Any]] = []
    vocabulary: dict[str, int] = {}
    for k, folder in enumerate(folders):
        progress("Asking", k, len(folders))
        begun = meter.now()
        runner = pick.load(asked.engine, folder, device=device, dtype=dtype, progress=progress)
        loading = meter.now() - begun
        words = runner.loaded.tokenizer.get_vocab()
        vocabulary = vocabulary or words
        answer = _answer(runner, asked, meter)
        same = words == vocabulary
        first = answers[0]["tokens"] if answers else answer["tokens"]
        answers.append(
            {"model": folder.name, "fingerprint": folder.fingerprint(), "kernel": runner.kernel}
            | answer
            | {
                "load_seconds": loading,
                "same_tokenizer": same,
                "differs_at": differs_at(first, answer["tokens"]) if same else None,
            }
        )
        del runner
        meter.release()
    progress("Asking", len(folders), len(folders))
    return {
        "question": asked.question,
        "images": [image.name for image in asked.images],
        "engine": asked.engine,
        "max_new_tokens": asked.max_new_tokens,
        "dtype": str(dtype).removeprefix("torch."),
        **models.machine(device),
        "answers": answers,
    }


def differs_at(first: Sequence[int], other: Sequence[int]) -> int | None:
    """Number, from 0, of the first token that differs; None where there is none."""
    for k, (one, two) in enumerate(zip(first, other, strict=False)):
        if one != two:
            return k
    return None if len(first) == len(other) else min(len(first), len(other))


def _check(folders: Sequence[ModelFolder], asked: Asked) -> None:
    """Refuse before the first model is loaded."""
    pick.check([asked.engine])
    if not asked.question.strip():
        raise UsageError("the question is empty", hint='qatbench ask MODEL "question"')
    for folder in folders:
        if asked.images and not folder.arch.is_vlm:
            raise UsageError(
                f"{folder.name} is a text model: it cannot answer a question with an image",
                hint="leave --image out, or ask vision-language models only",
            )
    for image in asked.images:
        if not image.exists():
            raise PrerequisiteError(f"missing image {image}", hint="--image FILE")
        open_rgb(image)


def _answer(runner: Runner, asked: Asked, meter: Meter) -> dict[str, Any]:
    prompt = Encoder(runner.loaded).prompt(asked.question, asked.images)
    folder = runner.loaded.folder
    length, most = len(prompt) + asked.max_new_tokens, most_positions(folder.config)
    if most is not None and length > most:
        raise UsageError(
            f"{folder.name} has {most} positions: a prompt of {len(prompt)} tokens and an answer"
            f" of {asked.max_new_tokens} need {length}",
            hint="a shorter question, or a smaller --max-new-tokens",
        )
    try:
        return {"prompt_tokens": len(prompt)} | _told(runner, [prompt], asked, meter)
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        raise PrerequisiteError(
            f"{folder.name} does not fit into the memory of {meter.device}",
            hint="--dtype bfloat16, a smaller model, or --device cpu",
        ) from error


def _told(runner: Runner, prompts: list[Any], asked: Asked, meter: Meter) -> dict[str, Any]:
    # Not `writing.written`: the clock is read after the first token, and no room is made meanwhile.
    ending = ends(runner.loaded)
    if meter.device.type == "cuda":
        runner.start(prompts, 2)  # kernels are made at first use: not on this answer's time
    begun = meter.now()
    started = runner.start(prompts, asked.max_new_tokens)
    tokens = started.first.tolist()
    first = meter.now()
    while len(tokens) < asked.max_new_tokens and not ending.intersection(tokens):
        count = min(runner.at_once, asked.max_new_tokens - len(tokens))
        tokens += runner.step(started, count)[0].tolist()
    done, decoded = meter.now(), len(tokens) - 1
    last = next((k for k, token in enumerate(tokens) if token in ending), None)
    tokens = tokens[:last]
    text = runner.loaded.tokenizer.decode(tokens, skip_special_tokens=True)
    return {
        "text": text.strip(),
        "tokens": tokens,
        "ended": last is not None,
        "first_token_seconds": first - begun,
        "seconds": done - begun,
        "tokens_per_second": decoded / (done - first) if decoded else None,
    }
