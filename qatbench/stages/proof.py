"""The proof of an export: plain transformers reload it, and its logits are the intended ones."""

from __future__ import annotations

import io
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from qatbench.errors import ArtifactError, NumericsError
from qatbench.stages.common import own_process
from qatbench.vlm import load as models
from qatbench.vlm.batch import Encoded, Encoder
from qatbench.vlm.load import Loaded, ModelFolder

# Reloaded logits may differ from the intended ones by the kernels' rounding alone: they hold scale
# times code in fp16, 2^-11 a weight. As a share of the logits' standard deviation the largest
# difference on the tests' random models is 0 at 2 bits, 0.005 at 3 and 0.007 at 4; a wrong zero
# point, scale, nibble order, norm or vision weight in one layer moves it by 1.5 and more
# (tests/stages/test_export.py asserts below 0.01 and above 0.5).
RELOAD_BOUND = 0.05
# One scale a row has the library pick another CPU kernel, which multiplies in bf16 (2^-9): on the
# same models up to 0.1. Defects are still 15 times that.
COARSE_KERNELS, COARSE_BOUND = ("TorchFusedLinear", "TorchFusedAwqLinear"), 0.3
PROOF_TEXT = "Question: Which of these is a renewable resource, and why does it matter?\nAnswer:"


def prove(folder: Path, intended: Loaded, *, fresh: bool = False) -> dict[str, Any]:
    """Reload with plain transformers (CPU, fp32) and compare logits with the intended model.

    `fresh` does so in a new process, where nothing but transformers was imported before.

    Returns: for `text` and, for a VLM, `image`: the largest difference of a logit over the
        standard deviation of the logits; the bound; the linear's class that multiplied.
    Raises: NumericsError when a difference is above the bound or not a number.
    """
    wanted = probe(intended)
    got, kernel = elsewhere(folder) if fresh else answers(folder)
    bound = COARSE_BOUND if kernel in COARSE_KERNELS else RELOAD_BOUND
    record: dict[str, Any] = {"bound": bound, "kernel": kernel}
    for kind, logits in wanted.items():
        error = ((got[kind] - logits).abs().max() / logits.std()).item()
        record[kind] = float(f"{error:.3g}")
        if not error <= bound:
            raise NumericsError(
                f"reloaded logits ({kind}) differ by {error:.3g} of their spread, bound {bound}",
                hint="the checkpoint was not published; please report this",
            )
    return record


def answers(folder: Path) -> tuple[dict[str, Tensor], str]:
    """Logits of a folder as plain transformers load it, and the linear's class that multiplied."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    at = ModelFolder(str(folder), folder, config, {})
    loaded = models.load(at, device="cpu", dtype=torch.float32)
    return probe(loaded), models.kernel_name(loaded)


def elsewhere(folder: Path) -> tuple[dict[str, Tensor], str]:
    """`answers` of a new process.

    Raises: ArtifactError when it fails, with its last line.
    """
    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch) / "logits.safetensors"
        ended = own_process("qatbench.stages.proof", str(folder.resolve()), str(file))
        if ended.returncode:
            last = (ended.stderr.strip().splitlines() or ["no message"])[-1]
            raise ArtifactError(f"{folder} does not reload in a new process: {last}")
        return load_file(file), ended.stdout.strip().splitlines()[-1]


@torch.inference_mode()
def probe(loaded: Loaded) -> dict[str, Tensor]:
    """Logits of one text and, for a VLM, one image prompt: (1, tokens, vocabulary) fp32 each.

    A dense model is moved to the CPU in fp32.
    """
    model = loaded.model.to("cpu", torch.float32) if loaded.kernel == "dense" else loaded.model
    model.eval()
    encoder = Encoder(loaded)
    prompts: dict[str, Encoded] = {"text": encoder.prompt(PROOF_TEXT, None)}
    if loaded.processor is not None:
        prompts["image"] = encoder.prompt(PROOF_TEXT, _proof_image())
    return {kind: model(**prompt.inputs()).logits.float() for kind, prompt in prompts.items()}


def _proof_image() -> bytes:
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (96, 96, 3), generator=generator, dtype=torch.uint8)
    stream = io.BytesIO()
    Image.fromarray(pixels.numpy()).save(stream, "PNG")
    return stream.getvalue()


def main(folder: str, file: str) -> None:
    """Write the logits of a folder, and say the kernel."""
    logits, kernel = answers(Path(folder))
    save_file({kind: value.contiguous() for kind, value in logits.items()}, file)
    sys.stdout.write(kernel + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
