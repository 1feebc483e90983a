"""mini train: make a built-in model from nothing but the drawn corpus.

Every step takes rows with pictures and rows without; pictures are drawn on the device from their
tile numbers. The forward is LLaVA's own (tower, projector, language model), with the visual tokens
at fixed places, so that the language model compiles to one graph.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
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
from qatbench.mini.corpus import OPENING, Corpus, Pile, make
from qatbench.mini.draw import tile_pixels
from qatbench.mini.facts import facts as draw_facts
from qatbench.mini.questions import PICTURES

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class PretrainSettings:
    """How a built-in model is made; the defaults are those of the shipped weights."""

    size: str = "student"
    seed: int = 0
    steps: int = 4000
    lr: float = 1.5e-3
    warmup: int = 100
    weight_decay: float = 0.05
    clip: float = 1.0
    picture_rows: int = 256  # a step
    text_rows: int = 512
    pictures: int = 800_000  # rows drawn
    questions: int = 400_000  # questions without a picture drawn
    variants: int = 4  # statements of every subject drawn
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
    if folder.exists() and any(folder.iterdir()):
        raise UsageError(f"{folder} exists and is not empty", hint="name a new folder")
    started = time.monotonic()
    corpus = make(
        settings.seed,
        pictures=settings.pictures,
        questions=settings.questions,
        variants=settings.variants,
        held_out=held_out(settings.seed),
        progress=progress,
    )
    drawn = time.monotonic() - started
    model = models.build(settings.size, settings.seed).to(device)
    log = _fit(model, corpus, settings, device, progress)
    models.save(model, folder)
    facts = {
        "settings": asdict(settings),
        "parameters": sum(p.numel() for p in model.parameters()),
        "vocabulary": len(models.vocabulary()),
        "picture_rows": len(corpus.pictures.ids),
        "text_rows": len(corpus.texts.ids),
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
    torch.backends.cuda.matmul.allow_tf32 = True
    model.train()
    decay = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim <= 1]
    groups: list[dict[str, Any]] = [{"params": decay}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(
        groups, lr=settings.lr, betas=(0.9, 0.95), weight_decay=settings.weight_decay,
        fused=device.startswith("cuda"),
    )  # fmt: skip
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _lr(step, settings))
    loss_of = torch.compile(_loss) if settings.compile else _loss
    told: list[dict[str, float]] = []
    seen = _Stream(corpus.pictures, settings.picture_rows, device, settings.seed)
    read = _Stream(corpus.texts, settings.text_rows, device, settings.seed)
    tiles = _normalised_tiles(device)
    inner = model.model
    parts = (inner.language_model, model.lm_head)
    started = time.monotonic()
    for step in range(1, settings.steps + 1):
        ids, weights, grids = seen.next()
        pixels = _pixels(tiles, grids)
        with torch.autocast("cuda", torch.bfloat16, enabled=device.startswith("cuda")):
            states = inner.vision_tower(pixels, output_hidden_states=True).hidden_states[-2]
            visual = inner.multi_modal_projector(states[:, 1:])
            picture_loss = loss_of(*parts, ids, weights, visual)
            ids, weights, _ = read.next()
            text_loss = loss_of(*parts, ids, weights, None)
        torch.autograd.backward(picture_loss + text_loss)
        torch.nn.utils.clip_grad_norm_(model.parameters(), settings.clip)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)
        if step % 50 == 0 or step == settings.steps:
            told.append(_line(step, picture_loss, text_loss, time.monotonic() - started))
            progress(f"Training mini/{settings.size}", step, settings.steps)
    return told


def _line(step: int, picture_loss: Tensor, text_loss: Tensor, seconds: float) -> dict[str, float]:
    losses = {"picture_loss": picture_loss.item(), "text_loss": text_loss.item()}
    if not np.isfinite(sum(losses.values())):
        raise NumericsError(f"the loss of step {step} is not finite")
    return {"step": step, **losses, "seconds": round(seconds, 2)}


def _lr(step: int, settings: PretrainSettings) -> float:
    """Linear warm-up, then a cosine to a hundredth."""
    if step < settings.warmup:
        return (step + 1) / settings.warmup
    done = (step - settings.warmup) / max(1, settings.steps - settings.warmup)
    return float(0.01 + 0.99 * 0.5 * (1 + np.cos(np.pi * min(1.0, done))))


def _loss(language: Any, head: Any, ids: Tensor, weights: Tensor, visual: Tensor | None) -> Tensor:
    """Weighted mean of the cross-entropy; ids, weights (B, LENGTH), visual (B, 36, D)."""
    embedded = language.embed_tokens(ids)
    if visual is not None:
        end = OPENING + models.VISUAL_TOKENS
        visual = visual.to(embedded.dtype)
        embedded = torch.cat([embedded[:, :OPENING], visual, embedded[:, end:]], dim=1)
    hidden = language(inputs_embeds=embedded, use_cache=False).last_hidden_state
    logits = head(hidden[:, :-1]).float()
    losses = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
    shares = weights[:, 1:].flatten().float()
    return (losses * shares).sum() / shares.sum()


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
        self.rows, self.device = min(rows, len(pile.ids)), device
        self.random = torch.Generator(device="cpu").manual_seed(seed)
        self.order, self.at = torch.empty(0, dtype=torch.long), 0

    def next(self) -> tuple[Tensor, Tensor, Tensor]:
        """Ids (B, LENGTH) int64, weights (B, LENGTH) fp16, grids (B, 6, 6) int64 or empty."""
        if self.at + self.rows > len(self.order):
            self.order, self.at = torch.randperm(len(self.ids), generator=self.random), 0
        chosen = self.order[self.at : self.at + self.rows].to(self.device)
        self.at += self.rows
        grids = self.grids[chosen].long() if len(self.grids) else self.grids.long()
        return self.ids[chosen].long(), self.weights[chosen], grids
