"""Fast greedy decoding of language and vision-language models, 16-bit or INT4.

`runner` is the interface that measuring, asking and evaluating use; `plain` is transformers behind
it, `fast` this project's engine.
"""
