"""What fake quantization and a teacher cost: ratios taken side by side in one run, on one GPU.

layer  one LLaVA-1.5-7B decoder layer, forward and backward in bf16, 1024 and 4096 tokens: plain
       linears, fake-quantized eagerly, through torch.compile, and by the Triton kernels that the
       trainer uses; then the layer as one compiled block, plain and fake-quantized.
llava  one optimizer step of GRACE, LLaVA-1.5 13B -> 7B (random weights of the true shapes), 8 x
       704 tokens of which 576 are visual, against plain fine-tuning of the student alone.
qwen   the same, Qwen2-VL 7B -> 2B.

All of it is the trainer's own code: objective.accumulate, lsq, optimizers, gradient checkpointing,
8-bit AdamW on bf16 weights with stochastic rounding.

How often weights are fake-quantized. A micro-batch does it twice (forward and, under checkpointing,
again in the recomputation) and takes the gradient back once. Compiled, each is one pass over the
weights: 2 + 2 bytes a weight forward, 2 + 2 + 2 backward. For 6.5e9 weights on 3.35 TB/s that is 8
+ 8 + 12 = 28 ms, below 3 % of a step of 1.2 s. Keeping the fake-quantized weights of a step for all
its micro-batches would save half of it and hold 14 GB more: 14 (weights) + 14 (gradients) + 14
(moments) + 26 (teacher) + 14 = 82 GB do not fit. Kept block by block they would live as long as a
block's recomputation does, which is what checkpointing does already. So they are computed anew,
and a large micro-batch is what amortizes them: a step here is one micro-batch of 8.

What else costs: norms, rotary embeddings and SwiGLU. The steps have the decoder blocks of both
models compiled (`train-qat --compile-blocks`; `--no-blocks` here: eager), in all rows,
fine-tuning's too. `--kept N ...` leaves the last N blocks out of the recomputation
(`--kept-blocks`): they hold their activations at the start of the backward pass only, when the
gradients of the others have not taken that room yet. `--profile FILE` writes where GRACE's time
goes, kernel by kernel.

    python benchmarks/train_step.py [layer] [llava] [qwen] [--no-blocks] [--kept N ...] [--tiny]
        [--profile FILE] [--json FILE]
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import gc
import json
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from qatbench.quant import kernels, lsq
from qatbench.quant.grid import Grid
from qatbench.stages import optimizers
from qatbench.stages.distributed import ALONE
from qatbench.stages.objective import Distillation, StepLoss, _teach, accumulate
from qatbench.stages.student import checkpoint_decoder, compile_decoder
from qatbench.stages.train_settings import TrainSettings
from qatbench.vlm import layout
from qatbench.vlm.batch import backbone
from qatbench.vlm.training import MicroBatch

# hidden, inner, layers, heads, key-value heads, vocabulary
LLAVA = {"7B": (4096, 11008, 32, 32, 32, 32064), "13B": (5120, 13824, 40, 40, 40, 32064)}
QWEN = {"2B": (1536, 8960, 28, 12, 2, 151936), "7B": (3584, 18944, 28, 28, 4, 152064)}
TINY = {"student": (128, 256, 2, 4, 4, 512), "teacher": (192, 384, 2, 6, 6, 512)}
GRID = Grid(4, 128)
ROWS, LENGTH, PATCHES, ANSWER = 8, 704, 24, 64  # PATCHES squared are the visual tokens
TARGETS = {
    "layer 1024": "1.60 x", "layer 4096": "1.10 x", "block 1024": "1.60 x",
    "block 4096": "1.10 x", "llava": ">= 6.5 /s, <= 72 GB", "qwen": "-",
}  # fmt: skip
LAYERS = ("plain", "eager", "compiled", "kernels", "block, plain", "block, kernels")
Family = Callable[[tuple[int, ...], bool], Any]


def llava_config(sizes: tuple[int, ...], tiny: bool) -> Any:
    """LLaVA-1.5: CLIP ViT-L/14 at 336 pixels, a projector, a Llama."""
    vision = transformers.CLIPVisionConfig(
        hidden_size=64 if tiny else 1024, intermediate_size=128 if tiny else 4096,
        num_hidden_layers=2 if tiny else 24, num_attention_heads=4 if tiny else 16,
        image_size=14 * PATCHES, patch_size=14, projection_dim=64 if tiny else 768,
    )  # fmt: skip
    return transformers.LlavaConfig(
        vision_config=vision, text_config=transformers.LlamaConfig(**text(sizes)),
        image_token_id=1, vision_feature_select_strategy="default", vision_feature_layer=-2,
        tie_word_embeddings=False,
    )  # fmt: skip


def qwen_config(sizes: tuple[int, ...], tiny: bool) -> Any:
    """Qwen2-VL: its ViT with a merger, a Qwen2 with M-RoPE; the 2B ties head and embeddings."""
    head = sizes[0] // sizes[3]
    rope = {
        "rope_type": "default", "rope_theta": 1e6,
        "mrope_section": [head // 8, 3 * head // 16, 3 * head // 16],
    }  # fmt: skip
    words = text(sizes) | {"rope_parameters": rope, "tie_word_embeddings": sizes[0] == 1536}
    vision = {
        "embed_dim": 64 if tiny else 1280, "depth": 2 if tiny else 32,
        "num_heads": 4 if tiny else 16, "hidden_size": sizes[0],
    }  # fmt: skip
    return transformers.Qwen2VLConfig(
        text_config=words, vision_config=vision, image_token_id=1, video_token_id=2,
        vision_start_token_id=3, vision_end_token_id=4,
        tie_word_embeddings=words["tie_word_embeddings"],
    )  # fmt: skip


def text(sizes: tuple[int, ...]) -> dict[str, Any]:
    """Sizes of a language model."""
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
             "num_key_value_heads", "vocab_size")  # fmt: skip
    return dict(zip(names, sizes, strict=True)) | {"max_position_embeddings": 4096}


def build(config: Any, device: torch.device) -> Any:
    """A model of random bf16 weights, made where it is used."""
    arch = layout.architecture(config.to_dict())
    with torch.device(device):
        return getattr(transformers, arch.model_class)._from_config(
            config, dtype=torch.bfloat16, attn_implementation="sdpa"
        )


def fake_quantized(model: nn.Module, names: list[str], kind: str) -> None:
    """Put the named linears on the grid, with plain max scales: a search would take minutes.

    `kind` is whose arithmetic: `eager`, `compiled` or `kernels`, which are those of the trainer.
    """
    linears = {name: model.get_submodule(name) for name in names}
    scales = {
        name: linear.weight.detach().unflatten(1, (-1, GRID.group_size)).abs().amax(-1).float() / 7
        for name, linear in linears.items()
    }
    layers = lsq.attach(model, names, GRID, scales)
    if kind == "kernels":
        lsq.compile_layers(model, next(model.parameters()).device)
    for layer in layers.values() if kind == "compiled" else ():
        layer.kernels = kernels.compiled()


# --- one layer ------------------------------------------------------------------------------------


def layer_times(device: torch.device, tiny: bool) -> list[dict[str, Any]]:
    """Time of a decoder layer's forward and backward at two lengths."""
    from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRotaryEmbedding

    sizes = TINY["student"] if tiny else LLAVA["7B"]
    config = transformers.LlamaConfig(**text(sizes), attn_implementation="sdpa")
    names = [*layout.ATTENTION, *layout.MLP]
    rows = []
    for tokens in (64, 128) if tiny else (1024, 4096):
        for kind in LAYERS:
            free()
            block, kind = kind.startswith("block, "), kind.removeprefix("block, ")
            with torch.device(device):
                layer = LlamaDecoderLayer(config, 0).to(torch.bfloat16)
                hidden = torch.randn(1, tokens, sizes[0], dtype=torch.bfloat16)
                places = LlamaRotaryEmbedding(config)(hidden, torch.arange(tokens)[None])
            if kind != "plain":
                fake_quantized(layer, names, kind)
            if block:
                layer.compile()
            hidden.requires_grad_()

            def once(layer: Any = layer, hidden: Tensor = hidden, places: Any = places) -> None:
                for tensor in (hidden, *layer.parameters()):
                    tensor.grad = None
                out = layer(hidden, position_embeddings=places)
                (out[0] if isinstance(out, tuple) else out).sum().backward()

            seconds, peak = measured(once, device, 1 if tiny else 30)
            what = f"{'block' if block else 'layer'} {tokens}"
            rows.append({"what": what, "kind": kind, "ms": 1e3 * seconds, "peak_gb": peak})
            del layer, hidden, places, once
    return with_ratios(rows, "ms")


# --- a whole step ---------------------------------------------------------------------------------


def batch_of(model: Any, config: Any, rows: int, length: int, device: torch.device) -> MicroBatch:
    """Rows of equal length: a few words, an image, words of which the last ANSWER are supervised.

    Positions are those of TrainingData.collate for rows that have a sequence each; none has a mask.
    """
    generator = torch.Generator().manual_seed(0)
    visual = PATCHES**2
    ids = torch.randint(10, 500, (rows, length), generator=generator)
    ids[:, 5 : 5 + visual] = config.image_token_id
    inputs: dict[str, Tensor] = {"input_ids": ids}
    side = 14 * PATCHES
    if config.model_type == "llava":
        inputs["position_ids"] = torch.arange(length).repeat(rows, 1)
        pixels = torch.randn(rows, 3, side, side, generator=generator)
    else:
        grid = torch.tensor([[1, 2 * PATCHES, 2 * PATCHES]] * rows)
        kinds = (ids == config.image_token_id).long()
        inputs["position_ids"], _ = backbone(model).get_rope_index(
            ids, mm_token_type_ids=kinds, image_grid_thw=grid
        )
        inputs["image_grid_thw"] = grid
        pixels = torch.randn(rows * 4 * visual, 3 * 2 * 14**2, generator=generator)
    inputs |= {"pixel_values": pixels.bfloat16()}
    inputs = {name: value.to(device) for name, value in inputs.items()}
    starts = torch.arange(rows, device=device)[:, None] * length
    tail = torch.arange(length - ANSWER - 1, length - 1, device=device)
    where = (starts + tail).flatten()
    every = (starts + torch.arange(5 + visual, length - 1, device=device)).flatten()
    flat = inputs["input_ids"].flatten()
    seen = torch.arange(5, 5 + visual, device=device)
    images = [seen + start for start in starts[:, 0]]
    return MicroBatch(inputs, where, flat[where + 1], images, every, flat[every + 1])


class Step:
    """One optimizer step of the trainer: `plain` fine-tuning, or `grace` with a teacher."""

    def __init__(
        self, student: Any, teacher: Any | None, kind: str, length: int, blocks: bool, kept: int
    ) -> None:
        device = next(student.parameters()).device
        config = student.config
        arch, self.kind = layout.architecture(config.to_dict()), kind
        if kind != "plain":
            names = list(layout.linear_shapes(config.to_dict()))
            fake_quantized(student, names, "kernels")
        for name, parameter in student.named_parameters():
            parameter.requires_grad_(not arch.frozen(name))
        student.train()
        checkpoint_decoder(student, arch, kept)
        for model in filter(None, (student, teacher) if blocks else ()):
            compile_decoder(model, arch)
        self.student, self.teacher = student, teacher
        named = student.named_parameters()
        self.parameters = {name: p for name, p in named if p.requires_grad}
        self.settings = TrainSettings(
            method="grace", steps=100, lr=1e-5, optimizer="adamw8bit", weights="bfloat16"
        )
        self.optimizer = optimizers.build(self.settings, self.parameters, device)
        self.batch = batch_of(student, config, ROWS if length == LENGTH else 2, length, device)
        self.number = 0

    def parts(self, device: torch.device) -> dict[str, float]:
        """Milliseconds of what can be timed by itself; the rest is the student's passes."""
        self()  # leaves no gradients: the optimizer is timed on new ones
        for parameter in self.parameters.values():
            parameter.grad = torch.zeros_like(parameter)
        found = {"clip": lambda: ALONE.clip(self.parameters.values(), 1.0),
                 "optimizer": lambda: optimizers.step(self.optimizer, 0, self.number)}  # fmt: skip
        if self.teacher:
            found["teacher"] = lambda: _teach(
                self.student, self.teacher, [self.batch], True, Distillation(),
                contextlib.nullcontext,
            )  # fmt: skip
        return {name: 1e3 * measured(once, device, 3)[0] for name, once in found.items()}

    def __call__(self) -> StepLoss:
        """Forward, backward and update; returns the losses."""
        terms = Distillation() if self.teacher else Distillation(kl="none", rcka=False)
        loss = accumulate(
            self.student, self.teacher, [self.batch], terms, 0.5, 3.0, contextlib.nullcontext
        )
        ALONE.clip(self.parameters.values(), 1.0)
        optimizers.step(self.optimizer, 0, self.number)
        self.optimizer.zero_grad(set_to_none=True)
        self.number += 1
        return loss


def step_times(
    what: str, family: Family, sizes: dict[str, tuple[int, ...]], device: torch.device,
    tiny: bool, blocks: bool, kept: Sequence[int], profile: str | None,
) -> list[dict[str, Any]]:  # fmt: skip
    """Samples a second and peak memory of fine-tuning alone and of GRACE."""
    small, large = list(sizes.values())
    length = 5 + PATCHES**2 + 2 * ANSWER if tiny else LENGTH
    rows = []
    for kind, keep in (("plain", kept[0]), *(("grace", keep) for keep in kept)):
        free()
        student = build(family(small, tiny), device)
        teacher = None
        if kind != "plain":
            teacher = build(family(large, tiny), device).eval().requires_grad_(False)
        step = Step(student, teacher, kind, length, blocks, keep)
        seconds, peak = measured(step, device, 1 if tiny else 5)
        losses, parts = dataclasses.asdict(step()), step.parts(device)
        if profile and kind == "grace" and keep == kept[-1]:
            profiled(step, profile)
        samples = step.batch.inputs["input_ids"].shape[0]
        name = "fine-tuning" if kind == "plain" else f"grace, {keep}"
        rows.append({"what": what, "kind": name, "ms": 1e3 * seconds,
                     "samples_per_second": samples / seconds, "peak_gb": peak,
                     "kept_blocks": keep, "losses": losses, "parts_ms": parts})  # fmt: skip
        del student, teacher, step
    return with_ratios(rows, "ms")


# --- measuring ------------------------------------------------------------------------------------


def measured(once: Callable[[], Any], device: torch.device, times: int) -> tuple[float, float]:
    """(median seconds, peak GB of 1e9 bytes) of a call after warm-up; the peak has the warm-up."""
    cuda = device.type == "cuda"
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    for _ in range(1 if times == 1 else 3):
        once()
    taken = []
    for _ in range(times):
        if cuda:
            torch.cuda.synchronize()
        started = time.perf_counter()
        once()
        if cuda:
            torch.cuda.synchronize()
        taken.append(time.perf_counter() - started)
    peak = torch.cuda.max_memory_allocated() / 1e9 if cuda else 0.0
    return sorted(taken)[len(taken) // 2], peak


def profiled(step: Step, file: str) -> None:
    """Write the kernels of a step by their time on the device."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as found:
        step()
        torch.cuda.synchronize()
    averages = found.key_averages()
    with open(file, "w", encoding="utf-8") as stream:
        for order in ("self_cuda_time_total", "self_cpu_time_total"):
            stream.write(averages.table(sort_by=order, row_limit=40, max_name_column_width=90))


def free() -> None:
    """Give back what the last measurement held."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def with_ratios(rows: list[dict[str, Any]], key: str) -> list[dict[str, Any]]:
    """Add each row's ratio to the first row of the same `what`."""
    base: dict[str, float] = {}
    for row in rows:
        row["ratio"] = row[key] / base.setdefault(row["what"], row[key])
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """The rows for people."""
    lines = [f"{'':12} {'':12} {'ms':>9} {'x plain':>8} {'/s':>7} {'peak GB':>8}  target"]
    for row in rows:
        rate = f"{row['samples_per_second']:.2f}" if "samples_per_second" in row else ""
        told = row["kind"] == "kernels" or row["kind"].startswith("grace")
        target = TARGETS.get(row["what"], "") if told else ""
        lines.append(
            f"{row['what']:12} {row['kind']:12} {row['ms']:9.2f} {row['ratio']:8.2f} {rate:>7} "
            f"{row['peak_gb']:8.2f}  {target}"
        )
    return "\n".join(lines)


def main() -> None:
    """Measure, print the table and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("what", nargs="*", help="layer, llava, qwen; default all")
    parser.add_argument("--tiny", action="store_true", help="a smoke test of small sizes, any CPU")
    parser.add_argument("--no-blocks", action="store_true", help="leave the decoder blocks eager")
    parser.add_argument("--kept", type=int, nargs="+", default=[0], help="blocks without recompute")
    parser.add_argument("--profile", help="file for the kernels of GRACE's step")
    parser.add_argument("--json", help="file for the figures")
    given = parser.parse_args()
    wanted = given.what or ["layer", "llava", "qwen"]
    if unknown := set(wanted) - {"layer", "llava", "qwen"}:
        parser.error(f"unknown: {', '.join(sorted(unknown))}")
    if not torch.cuda.is_available() and not given.tiny:
        parser.error("true sizes need a CUDA device; --tiny runs anywhere")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    rows: list[dict[str, Any]] = []
    if "layer" in wanted:
        rows += layer_times(device, given.tiny)
    for what, family, sizes in (("llava", llava_config, LLAVA), ("qwen", qwen_config, QWEN)):
        if what in wanted:
            chosen = TINY if given.tiny else sizes
            rows += step_times(
                what, family, chosen, device, given.tiny, not given.no_blocks, given.kept,
                given.profile,
            )  # fmt: skip
    name = torch.cuda.get_device_name() if device.type == "cuda" else "cpu"
    print(f"{name}, torch {torch.__version__}")
    print(table(rows))
    if given.json:
        with open(given.json, "w", encoding="utf-8") as stream:
            told = {"device": name, "torch": torch.__version__, "blocks": not given.no_blocks}
            json.dump(told | {"rows": rows}, stream, indent=2)


if __name__ == "__main__":
    main()
