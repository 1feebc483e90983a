"""mini train: make a built-in model from nothing but the drawn corpus.

Every step takes rows with pictures and rows without; pictures are drawn on the device from their
tile numbers. The forward is LLaVA's own (tower, projector, language model), with the visual tokens
at fixed places, so that the language model compiles to one graph.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from qatbench import store
from qatbench.errors import NumericsError, UsageError
from qatbench.mini import models
from qatbench.mini.benchmark import CIRCULAR, SIZES, fill
from qatbench.mini.corpus import JOBS, OPENING, Amounts, Corpus, Pile, make
from qatbench.mini.draw import tile_pixels
from qatbench.mini.facts import facts as draw_facts
from qatbench.mini.questions import PICTURES

LR = {"student": 1e-3, "teacher": 8e-4}
WARM_UP = 3  # steps before a CUDA graph is captured
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class PretrainSettings:
    """How a built-in model is made; the defaults are those of the shipped weights."""

    size: str = "student"
    seed: int = 0
    steps: int = 19_000
    lr: float | None = None  # highest learning rate; None: the size's own, LR
    warmup: int = 200
    weight_decay: float = 0.05
    clip: float = 1.0
    rows: tuple[int, int, int, int] = (40, 112, 104, 32)  # a step, of each pile of the corpus
    amounts: Amounts = field(default_factory=Amounts)  # of what is drawn
    compile: bool = True


def pretrain(settings: PretrainSettings, out: Path, device: str, progress: Progress) -> Path:
    """Train a model; writes out/<size>/ and out/<size>.jsonl (the log).

    Returns: the model's folder.
    Raises: UsageError for an unknown size or a folder that is not empty; NumericsError when the
        loss is no longer finite.
    """
    folder = out / settings.size
    if settings.size not in models.SIZES:
        raise UsageError(f"no size {settings.size!r}", hint=", ".join(models.SIZES))
    if settings.lr is None:
        settings = replace(settings, lr=LR[settings.size])
    elif not settings.lr > 0:
        raise UsageError(f"a learning rate of {settings.lr}", hint="give one above 0")
    if min(settings.amounts) < JOBS:
        raise UsageError(
            f"fewer than {JOBS} texts of a sort", hint="draw more: one a worker's part"
        )
    if folder.exists() and any(folder.iterdir()):
        raise UsageError(f"{folder} exists and is not empty", hint="name a new folder")
    started = time.monotonic()
    corpus = make(settings.seed, settings.amounts, held_out(settings.seed), progress)
    drawn = time.monotonic() - started
    model = models.build(settings.size, settings.seed).to(device)
    log = _fit(model, corpus, settings, device, progress)
    models.save(model, folder)
    facts = {
        "settings": asdict(settings),
        "parameters": sum(p.numel() for p in model.parameters()),
        "vocabulary": len(models.vocabulary()),
        "rows_drawn": [len(pile.ids) for pile in corpus],
        "drawing_seconds": round(drawn, 1),
        "training_seconds": round(time.monotonic() - started - drawn, 1),
    }
    lines = [json.dumps(line) for line in (facts, *log)]
    store.write_text(out / f"{settings.size}.jsonl", "\n".join(lines) + "\n")
    return folder


def held_out(seed: int) -> frozenset[str]:
    """Identities of all questions of the benchmark with this seed."""
    facts, seen = draw_facts(seed), set[str]()
    for name, size in SIZES.items():
        fill(facts, name, size, seed, seen)
    fill(facts, "dev", CIRCULAR["dev"], seed, seen, PICTURES)
    return frozenset(seen)


def _fit(
    model: Any, corpus: Corpus, settings: PretrainSettings, device: str, progress: Progress
) -> list[dict[str, float]]:
    assert settings.lr is not None  # pretrain() filled it in
    torch.backends.cuda.matmul.allow_tf32 = True
    model.train()
    step = _Step(model, corpus, settings, device)
    run = step.captured() if device.startswith("cuda") else step.run
    told: list[dict[str, float]] = []
    started = time.monotonic()
    for number in range(1, settings.steps + 1):
        step.prepare(settings.lr * _lr(number, settings))
        run()
        if number % 50 == 0 or number == settings.steps:
            told.append(_line(number, step.losses.tolist(), time.monotonic() - started))
            progress(f"Training mini/{settings.size}", number, settings.steps)
    return told


class _Step:
    """One optimizer step on tensors that stay where they are, so that CUDA can record it once.

    A step of such a small model takes less time than its launches do: on CUDA it is captured as
    one graph and replayed.
    """

    def __init__(self, model: Any, corpus: Corpus, settings: PretrainSettings, device: str) -> None:
        self.model, self.settings, self.device = model, settings, device
        self.streams = [
            _Stream(pile, rows, device, settings.seed)
            for pile, rows in zip(corpus, settings.rows, strict=True)
        ]
        self.tiles = _normalised_tiles(device)
        self.on_cuda = device.startswith("cuda")
        self.lr = torch.zeros((), device=device)
        decay = [p for p in model.parameters() if p.ndim > 1]
        others = [p for p in model.parameters() if p.ndim <= 1]
        groups: list[dict[str, Any]] = [{"params": decay}, {"params": others, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(
            groups, lr=self.lr, betas=(0.9, 0.95), weight_decay=settings.weight_decay,
            fused=True, capturable=self.on_cuda,
        )  # fmt: skip
        self.loss = torch.compile(_losses) if settings.compile else _losses
        self.losses = torch.zeros(len(self.streams), device=device)

    def prepare(self, lr: float) -> None:
        """Choose the rows and the learning rate of the next step."""
        self.lr.fill_(lr)
        for stream in self.streams:
            stream.advance()

    def run(self) -> None:
        """Forward, backward, clipping and update; sets `losses`, one a pile."""
        self.optimizer.zero_grad(set_to_none=True)
        inner = self.model.model
        ids, weights, grids = zip(*(stream.rows() for stream in self.streams), strict=True)
        autocast = torch.autocast(
            "cuda", torch.bfloat16, enabled=self.on_cuda, cache_enabled=False
        )  # a cache of casts would not survive a captured graph
        with autocast:
            tower = inner.vision_tower(
                _pixels(self.tiles, torch.cat(grids[:2])), output_hidden_states=True
            )
            visual = inner.multi_modal_projector(tower.hidden_states[-2][:, 1:])
            losses = self.loss(
                inner.language_model,
                self.model.lm_head,
                torch.cat(ids),
                torch.cat(weights),
                visual,
                [len(rows) for rows in ids],
            )
        torch.autograd.backward(losses.sum())
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.settings.clip)
        self.optimizer.step()
        self.losses.copy_(losses.detach())

    def captured(self) -> Callable[[], None]:
        """Record `run` as a CUDA graph, after warm-up steps at a learning rate of zero."""
        side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(WARM_UP):
                self.prepare(0.0)
                self.run()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self.run()
        replay: Callable[[], None] = graph.replay
        return replay


def _line(step: int, losses: list[float], seconds: float) -> dict[str, float]:
    if not np.isfinite(sum(losses)):
        raise NumericsError(f"the loss of step {step} is not finite")
    return {"step": step, **dict(zip(Corpus._fields, losses, strict=True)),
            "seconds": round(seconds, 2)}  # fmt: skip


def _lr(step: int, settings: PretrainSettings) -> float:
    """Linear warm-up, then a cosine to a hundredth."""
    if step < settings.warmup:
        return (step + 1) / settings.warmup
    done = (step - settings.warmup) / max(1, settings.steps - settings.warmup)
    return float(0.01 + 0.99 * 0.5 * (1 + np.cos(np.pi * min(1.0, done))))


def _losses(
    language: Any, head: Any, ids: Tensor, weights: Tensor, visual: Tensor, parts: list[int]
) -> Tensor:
    """Weighted mean cross-entropy of each part of the rows.

    ids, weights (B, LENGTH); visual (P, 36, D) of the first P rows; parts: rows of each part, the
    sum is B.
    """
    embedded = language.embed_tokens(ids)
    rows, end = len(visual), OPENING + models.VISUAL_TOKENS
    visual = visual.to(embedded.dtype)
    pictured = torch.cat([embedded[:rows, :OPENING], visual, embedded[:rows, end:]], dim=1)
    embedded = torch.cat([pictured, embedded[rows:]])
    hidden = language(inputs_embeds=embedded, use_cache=False).last_hidden_state
    logits = head(hidden[:, :-1]).float()
    losses = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
    shares = weights[:, 1:].float()
    shared = losses.view_as(shares) * shares
    pairs = zip(torch.split(shared, parts), torch.split(shares, parts), strict=True)
    return torch.stack([weighted.sum() / whole.sum() for weighted, whole in pairs])


def _normalised_tiles(device: str) -> Tensor:
    """(TILES, 8, 8, 3) pixels as the image processor normalises them."""
    image = models.processor().image_processor
    mean, std = torch.tensor(image.image_mean), torch.tensor(image.image_std)
    tiles = torch.from_numpy(tile_pixels()).float() / 255
    return ((tiles - mean) / std).to(device)


def _pixels(tiles: Tensor, grids: Tensor) -> Tensor:
    """(B, 3, 48, 48) pictures of (B, 6, 6) tile numbers."""
    return tiles[grids].permute(0, 5, 1, 3, 2, 4).reshape(len(grids), 3, 48, 48)


class _Stream:
    """Batches of a pile on the device, epoch after epoch in a seeded order."""

    def __init__(self, pile: Pile, rows: int, device: str, seed: int) -> None:
        self.ids = torch.from_numpy(pile.ids).to(device)
        self.weights = torch.from_numpy(pile.weights).to(device)
        self.grids = torch.from_numpy(pile.grids).to(device)
        self.random = torch.Generator(device="cpu").manual_seed(seed)
        self.chosen = torch.zeros(min(rows, len(pile.ids)), dtype=torch.long, device=device)
        self.order, self.at = torch.empty(0, dtype=torch.long, device=device), 0

    def advance(self) -> None:
        """Choose the next rows."""
        rows = len(self.chosen)
        if self.at + rows > len(self.order):
            order = torch.randperm(len(self.ids), generator=self.random)
            self.order, self.at = order.to(self.chosen.device), 0
        self.chosen.copy_(self.order[self.at : self.at + rows])
        self.at += rows

    def rows(self) -> tuple[Tensor, Tensor, Tensor]:
        """Ids (B, LENGTH) int64, weights (B, LENGTH) fp16, grids (B, 6, 6) int64 or empty."""
        chosen = self.chosen
        grids = self.grids[chosen].long() if len(self.grids) else self.grids.long()
        return self.ids[chosen].long(), self.weights[chosen], grids
