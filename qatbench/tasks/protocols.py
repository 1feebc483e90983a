"""Evaluation protocols: the one prompt renderer and the one answer extractor per name.

A protocol fixes the user text, how a letter is read from a response, what option mode scores, and
whether the passes of a circular question count as one. `prompt` holds no image mark: where an image
goes is the model's matter. Facts about the public evaluators were read at the commits named in
`extract` and `extract_mmbench`.

What option mode scores (`continuation`): the protocols that show lettered options score " A", with
a leading space. A text LM gets the prompt as it is, which ends in "." or ":", and the chat texts of
LLaVA and SmolVLM end in "ASSISTANT:" and "Assistant:"; after all of these the letter is a word of
its own. For a template that ends in a newline the caller strips the space.
"""

from __future__ import annotations

from qatbench.errors import UsageError
from qatbench.records import Question
from qatbench.tasks import protocols_mmbench, protocols_sqa
from qatbench.tasks.protocols_kind import Protocol

CHOICES = "choices"  # a form for training: `qatbench` with the options' texts before `Answer:`


def get(name: str) -> Protocol:
    """Look up a protocol; the parts of a VLMEvalKit name may be combined freely.

    Raises: UsageError if there is none of that name; the hint lists those there are.
    """
    found = _PROTOCOLS.get(name) or protocols_mmbench.combined(name)
    if found is None:
        raise UsageError(f"unknown protocol {name!r}", hint=f"protocols: {', '.join(names())}")
    return found


def names() -> list[str]:
    """List the names `get` knows, the recommended protocol first."""
    return list(_PROTOCOLS)


def with_answer(question: Question, name: str) -> tuple[str, str]:
    """(prompt, answer) of a question with a gold answer, by a protocol or in the form `choices`.

    Raises: UsageError if there is no protocol of that name.
    """
    protocol = get("qatbench" if name == CHOICES else name)
    text, answer = protocol.prompt(question), protocol.continuation(question, str(question.gold))
    if name == CHOICES:
        listed = "; ".join(question.options.values())
        text = text.removesuffix("Answer:") + f"Choices: {listed}\nAnswer:"
    return text, answer


_PROTOCOLS: dict[str, Protocol] = {
    protocol.name: protocol for protocol in (*protocols_sqa.TABLE, *protocols_mmbench.TABLE)
}
__all__ = ["CHOICES", "Protocol", "get", "names", "with_answer"]
