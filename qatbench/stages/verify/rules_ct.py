"""compressed-tensors, pack-quantized: targets and ignore, activation order."""

from __future__ import annotations

from collections.abc import Iterator

from qatbench.stages.verify import loaders
from qatbench.stages.verify.finding import Finding, entry, few, found
from qatbench.stages.verify.rules_packed import language_dense, language_packed
from qatbench.stages.verify.subject import HEAD, Subject, ct_weights


def targets(subject: Subject) -> Iterator[Finding]:
    """What targets and ignore take, as each loader matches them, against what is stored."""
    group = next(iter(subject.settings["config_groups"].values()))
    wanted, ignore = (
        loaders.flat(group.get("targets")),
        loaders.flat(subject.settings.get("ignore")),
    )
    names, packed = list(subject.skeleton.linears), language_packed(subject)
    repairable = not language_dense(subject)
    plain = loaders.transformers_ct(names, wanted, ignore)
    vllm = loaders.vllm_ct(subject.arch, names, wanted, ignore)
    for rule, taken in (("ct-ignore", plain), ("ct-ignore-vllm", vllm)):
        wrong = sorted((taken & subject.sixteen) | (packed - taken))
        if wrong:
            yield found(rule, entry("ignore"), f"{few(wrong)}", repairable=repairable)


def settings(subject: Subject) -> Iterator[Finding]:
    """Activation order, and what plain transformers makes of the format."""
    actorder = ct_weights(subject.settings).get("actorder")
    if actorder in ("group", "dynamic", True):
        yield found("ct-actorder", entry("config_groups: weights.actorder"), str(actorder))
    yield found("ct-slow", entry("format"))


def repaired_ignore(subject: Subject) -> list[str]:
    """Regexes that exempt every part but the decoder layers, in both loaders."""
    parts = (*subject.arch.vision, *subject.arch.projector)
    return [f"re:.*{name.rpartition('.')[2]}.*" for name in (*parts, HEAD)]
