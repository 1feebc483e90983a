"""Every rule of verify as data: whom the defect breaks, how, and what mends it.

docs/verify.md is this table; a test keeps the two alike. A rule that breaks no loader is a note.
What is said of transformers was run (5.23, optimum 2.3, gptqmodel 7.7, compressed-tensors 0.20, on
a CPU); what is said of vLLM is its 0.33 source's matching and type rules, which `loaders` holds as
plain functions. vLLM itself was not run.
"""

from __future__ import annotations

from typing import NamedTuple

ERROR, WRONG, NAN, IMAGES, SLOW = "error", "wrong numbers", "NaN", "NaN on images", "slow"


class Rule(NamedTuple):
    """What a finding means; `""` for a loader that it leaves alone."""

    transformers: str
    vllm: str
    means: str
    fix: str
    repair: str = "no"  # yes | no | if: only where the tensors say what belongs there


RULES: dict[str, Rule] = {
    # --- files ---------------------------------------------------------------------------------
    "weights-name": Rule(
        ERROR, "", "weights lie under a name that transformers does not look for",
        "name the file model.safetensors, or give shards their index", "yes"),
    "weights-twice": Rule(
        "", WRONG, "more weight files than transformers reads: vLLM reads others, or all of them",
        "keep one set of weight files", "yes"),
    "index-broken": Rule(
        WRONG, WRONG, "the shard index leaves out a file, whose weights are then not loaded",
        "write the index anew from the files", "yes"),
    "index-stale": Rule(
        "", "", "the shard index is wrong about some keys; both loaders read whole files",
        "write the index anew from the files"),
    "no-tokenizer": Rule(
        ERROR, ERROR, "there is no tokenizer", "copy the tokenizer files of the original model"),
    "no-processor": Rule(
        ERROR, ERROR, "there is no processor for images",
        "copy preprocessor_config.json or processor_config.json of the original model"),
    "no-chat-template": Rule(
        "", "", "there is no chat template: chat endpoints refuse, and the reload cannot ask",
        "copy chat_template.jinja of the original model"),
    "remote-code": Rule(
        "", "", "a file asks for code of its own (auto_map); it was not run, nor is it needed",
        "delete the auto_map entry"),
    # --- config --------------------------------------------------------------------------------
    "image-token": Rule(
        ERROR, ERROR, "the config's image token is not the tokenizer's: every image is refused",
        "set image_token_id to the tokenizer's id", "if"),
    "no-quantization-config": Rule(
        WRONG, ERROR, "packed weights, but config.json does not say how: they are left out",
        "put the quantization settings into config.json as quantization_config", "if"),
    "config-keys": Rule(
        ERROR, ERROR, "quantization_config lacks an entry that a loader asks for, or has no value",
        "add the entry", "if"),
    "bits-unsupported": Rule(
        ERROR, ERROR, "no loader has this width in this format",
        "quantize again at 2, 3, 4 or 8 bits"),
    "plain-only": Rule(
        "", "", "for plain transformers only: vLLM refuses this width in this format",
        "4 bits, or 8 as gptq, if vLLM is wanted"),
    "dtype-unknown": Rule(
        ERROR, ERROR, "the config names a dtype that torch does not have",
        "write bfloat16 or float16", "yes"),
    "dtype-nested": Rule(
        "", "", "nested configs name another dtype; both loaders go by the outermost",
        "write one dtype throughout"),
    "dtype-cast": Rule(
        "", "", "weights are stored in another type than the config's: cast while loading",
        "store them in the config's dtype"),
    "awq-fp16": Rule(
        "", "", "transformers runs AWQ in fp16 on a GPU, where this bf16 family may overflow",
        "compare knowingly, or pack as gptq"),
    # --- keys ----------------------------------------------------------------------------------
    "keys-spelling": Rule(
        WRONG, ERROR, "keys in a spelling that no loader knows: their weights are left out",
        "rename the keys as the family's published files have them", "yes"),
    "vllm-spelling": Rule(
        "", ERROR, "transformers finds these keys, vLLM does not",
        "rename the keys as the family's published files have them", "yes"),
    "keys-unknown": Rule(
        "", ERROR, "keys that belong to no part of the model: transformers passes over them",
        "delete the keys", "if"),
    "weights-missing": Rule(
        WRONG, ERROR, "weights are not in any file: transformers goes on with random ones",
        "export again, or fetch the missing shard"),
    "vision-missing": Rule(
        WRONG, ERROR, "vision weights are not in any file: random ones see the images",
        "add the vision tower of the original model"),
    "head-missing": Rule(
        WRONG, ERROR, "no lm_head.weight, and the config does not tie it to the embeddings",
        "add it, or tie_word_embeddings: true at the top of config.json if it is tied"),
    "tied-head-twice": Rule(
        "", "", "lm_head.weight repeats the tied embeddings",
        "leave lm_head.weight out"),
    "tied-head-differs": Rule(
        "", WRONG, "lm_head.weight is not the embeddings it is tied to: transformers takes it, "
        "vLLM does not",
        "tie_word_embeddings: false, or leave lm_head.weight out: which one was trained?"),
    "weights-shape": Rule(
        ERROR, ERROR, "a tensor has not the shape that config.json gives it",
        "take the config.json that belongs to these weights"),
    "weights-dtype": Rule(
        ERROR, ERROR, "a weight that is not packed is stored in a type that no loader casts",
        "store it in the config's dtype"),
    "not-finite": Rule(
        NAN, NAN, "a tensor holds NaN or infinity", "export again from sound weights"),
    # --- packed tensors ------------------------------------------------------------------------
    "packed-incomplete": Rule(
        NAN, ERROR, "a packed linear lacks a tensor that nothing else tells",
        "export again"),
    "packed-shape": Rule(
        ERROR, ERROR, "a packed tensor fits neither the config nor its neighbours",
        "export again"),
    "packed-dtype": Rule(
        ERROR, ERROR, "packed words are not int32", "store them as int32", "if"),
    "packed-wide": Rule(
        "", "", "packed tensors in a wider type than int32 and fp16: cast while loading",
        "store words as int32 and scales as fp16"),
    "zero-scales": Rule(
        WRONG, WRONG, "scales of 0: all weights of these groups read as 0", "quantize again"),
    "bits-differ": Rule(
        ERROR, ERROR, "the config's bits are not those of the tensors",
        "set bits to the tensors' width", "yes"),
    "group-differs": Rule(
        ERROR, ERROR, "the config's group size is not that of the scales",
        "set group_size to the scales'", "yes"),
    # --- which linears are packed --------------------------------------------------------------
    "linear-not-packed": Rule(
        WRONG, "", "a linear is stored in 16 bits, but transformers looks for a packed one",
        "name it in modules_to_not_convert (awq, in both spellings)", "if"),
    "fused-mixed": Rule(
        "", ERROR, "vLLM joins q, k, v (and gate, up): all must be quantized alike",
        "quantize all of them, or none"),
    "vision-quantized": Rule(
        WRONG, "", "vision weights are packed, which transformers does not look for",
        "store them in 16 bits", "if"),
    "projector-quantized": Rule(
        WRONG, "", "projector weights are packed, which transformers does not look for",
        "store them in 16 bits", "if"),
    "head-quantized": Rule(
        WRONG, "", "lm_head is packed, which transformers never looks for",
        "store it in 16 bits, lm_head: false", "if"),
    # --- gptq ----------------------------------------------------------------------------------
    "gptq-label": Rule(
        WRONG, "", "checkpoint_format is not the one the zero points are stored in",
        "gptq where symmetric zeros are stored as 2^(bits-1) - 1, gptq_v2 where as 2^(bits-1)",
        "if"),
    "gptq-zeros": Rule(
        "", WRONG, "sym is true but zero points are not the middle: vLLM does not read them",
        "sym: false for transformers alone, or quantize again"),
    "gptq-no-g-idx": Rule(
        ERROR, "", "no g_idx: transformers fills it with whatever was in memory",
        "add g_idx, the group of each input", "if"),
    "gptq-no-qzeros": Rule(
        WRONG, ERROR, "no qzeros: transformers fills them with whatever was in memory",
        "add the symmetric zero points", "if"),
    "gptq-g-idx-range": Rule(
        ERROR, "", "g_idx names groups that are not there", "export again"),
    "gptq-order": Rule(
        WRONG, WRONG, "g_idx is out of order with desc_act false: GPU kernels and vLLM ignore it",
        "desc_act: true (plain transformers only), or quantize again without it"),
    "gptq-desc-act": Rule(
        "", ERROR, "vLLM 0.33 refuses desc_act with groups",
        "desc_act: false if g_idx is in order, else quantize again", "if"),
    "gptq-sym": Rule(
        "", ERROR, "vLLM has symmetric GPTQ only (sym: true)",
        "sym: true if all zero points are the middle, else quantize again or pack as awq", "if"),
    "gptq-group-size": Rule(
        "", ERROR, "vLLM's GPTQ kernel has groups of 32, 64, 128 and whole rows only",
        "quantize again with one of these"),
    "gptq-dynamic": Rule(
        ERROR, ERROR, "per-layer rules in `dynamic`, which only some loaders follow",
        "delete `dynamic` if it changes nothing, else quantize all layers alike", "if"),
    "block-absent": Rule(
        "", "", "no block_name_to_quantize: optimum before 2.3 does not guess a VLM's layers",
        "block_name_to_quantize: model.language_model.layers"),
    "block-wrong": Rule(
        WRONG, "", "block_name_to_quantize is not where the packed layers are",
        "name the layers as transformers has them in memory", "yes"),
    "modules-list": Rule(
        WRONG, "", "modules_in_block_to_quantize does not list what is packed",
        "delete the entry", "if"),
    "short-modules": Rule(
        "", ERROR, "vLLM also finds these names in 16-bit parts, or not in packed ones",
        "delete modules_in_block_to_quantize: vLLM reads the types of the tensors", "if"),
    # --- awq -----------------------------------------------------------------------------------
    "awq-skip-transformers": Rule(
        IMAGES, "", "modules_to_not_convert misses 16-bit parts as transformers names them",
        "list every part in both spellings, e.g. visual and model.visual", "yes"),
    "awq-skip-vllm": Rule(
        "", ERROR, "modules_to_not_convert misses 16-bit parts as vLLM names them",
        "list every part in both spellings, e.g. visual and model.visual", "yes"),
    "awq-skip-dots": Rule(
        "", "", "a trailing dot in modules_to_not_convert rests on a detail of a regex",
        "list every part in both spellings, without dots"),
    "awq-skip-too-broad": Rule(
        WRONG, ERROR, "modules_to_not_convert exempts packed linears",
        "list only what is stored in 16 bits", "yes"),
    "awq-version": Rule(
        ERROR, "", "version is not gemm, the layout of these tensors",
        "version: gemm", "if"),
    "awq-zero-point": Rule(
        "", SLOW, "zero_point false: right numbers, but not vLLM's fast kernel",
        "zero_point: true, which symmetric data are a case of"),
    # --- compressed-tensors --------------------------------------------------------------------
    "ct-ignore": Rule(
        ERROR, "", "targets and ignore do not say what is packed, as transformers matches them",
        'whole names or regexes, e.g. "re:.*visual.*": a bare name covers no children', "if"),
    "ct-ignore-vllm": Rule(
        "", ERROR, "targets and ignore do not say what is packed, as vLLM matches them",
        'regexes, e.g. "re:.*visual.*"', "if"),
    "ct-actorder": Rule(
        ERROR, ERROR, "activation order by group is refused",
        "quantize again with actorder static, weight or null"),
    "ct-slow": Rule(
        SLOW, "", "plain transformers decompresses at the first forward: no INT4 memory or speed",
        "pack as gptq or awq"),
    # --- the reload ----------------------------------------------------------------------------
    "reload-fails": Rule(
        ERROR, "", "plain transformers does not load it, or not every weight of it",
        "export again"),
    "reload-nan": Rule(
        NAN, "", "loaded with plain transformers, it answers with NaN or infinity",
        "export again from sound weights"),
    "not-reloaded": Rule(
        "", "", "the real reload could not be done here: what stands above was read, not run",
        "run it where the packages and the memory are"),
}  # fmt: skip
