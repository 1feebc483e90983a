"""Peak main memory of `qatbench quantize --device cpu`, in bytes a weight, as `doctor` reckons.

A Llama of 222 million random weights (in bf16 on disk) goes through the verb, each method in a
process of its own; what that process held before it loaded anything is taken off. The figures are
`ON_CPU` in qatbench/vlm/memory.py, rounded up.

    python benchmarks/quantize_memory.py [--method M ...] [--samples 16]
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "tests")]
SIZES = {"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 16}


def build(folder: Path) -> int:
    """A Llama of random weights as a folder; the number of its weights."""
    import tiny
    import torch
    import transformers

    words = tiny.tokenizer()
    config = transformers.LlamaConfig(
        **SIZES, num_attention_heads=16, num_key_value_heads=16, vocab_size=8192,
        tie_word_embeddings=False,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).to(torch.bfloat16)
    model.save_pretrained(folder)
    words.save_pretrained(folder)
    return model.num_parameters()


def quantize(method: str, root: Path, samples: int) -> None:
    """One method, in this process; prints the bytes that it added at its peak."""
    from qatbench.quant import backends
    from qatbench.stages import quantize as stage
    from qatbench.stages.common import silent
    from qatbench.tasks import selector
    from qatbench.vlm import load as models

    if method in ("gptq", "awq"):
        with backends.quiet():
            backends._library()
    before = memory("VmRSS")
    chosen = selector.parse("scienceqa:train")
    settings = stage.QuantizeSettings(
        method, 4, 128, chosen, samples, device="cpu", iters=4,  # type: ignore[arg-type]
    )  # fmt: skip
    folder = models.find(str(root / "model"))
    data = {"scienceqa": str(root / "data")}
    stage.quantize(folder, settings, data, root / method, resume=False, progress=silent)
    print(memory("VmHWM") - before)


def memory(field: str) -> int:
    """Bytes that this process holds (VmRSS), or held at most (VmHWM)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    (line,) = (line for line in lines if line.startswith(f"{field}:"))
    return 1024 * int(line.split()[1])


def main() -> None:
    """Measure each method and print JSON."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--method", nargs="+", default=["rtn", "gptq", "awq", "autoround"])
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--inside", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.inside:
        quantize(given.method[0], given.inside, given.samples)
        return
    import tiny

    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch)
        weights = build(root / "model")
        tiny.save_questions(root / "data", text=given.samples, images=0)
        found: dict[str, float] = {}
        for method in given.method:
            command = [sys.executable, __file__, "--method", method, "--inside", str(root),
                       "--samples", str(given.samples)]  # fmt: skip
            ended = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
            found[method] = round(int(ended.stdout.split()[-1]) / weights, 1)
            print(method, found[method], file=sys.stderr, flush=True)
    print(json.dumps({"weights": weights, "bytes_a_weight": found}))


if __name__ == "__main__":
    main()
