"""speed.md and the tables of `qatbench speed`: what was measured, in words."""

from __future__ import annotations

from collections.abc import Sequence

from qatbench.records_speed import Speed, SpeedRow
from qatbench.report.tables import UNKNOWN, Row, markdown_table, megabytes, rate, spread

_COLUMNS = """\
- **decode tok/s**: tokens of all rows a second after the first one: median of {repeats} repeats \
[least, most]. **prefill tok/s**: prompt tokens of all rows over the time to the first token. \
**first ms**: that time, from prompts on the host on.
- **x first**, **x plain**: decoding over that of `{first}` in the same engine, and over the same \
model in plain transformers; medians of this run.
- **weights**, **cache**, **peak**: MB of 10^6 bytes. Weights and cache are counted; the peak is \
what the allocator of this model and engine held at most, and measured on CUDA only.
- **limit %**: decoding, of what the memory's bandwidth would allow if moving the weights once and \
the cache a step were all there is to do."""


def speed_rows(speed: Speed) -> list[Row]:
    """One row a model, engine, batch and context; all cells but the names are figures."""
    return [_row(row) for row in speed.rows]


def engine_rows(speed: Speed) -> list[Row]:
    """One row a model and engine: what multiplies, and what attends."""
    rows = {(row.model, row.engine): row for row in speed.rows}
    return [
        {
            "model": row.model,
            "engine": row.engine,
            "kernel": row.kernel,
            "attention": row.attention,
            "dtype": row.dtype,
            "weights MB": megabytes(row.weight_bytes),
        }
        for row in rows.values()
    ]


def question_rows(speed: Speed) -> list[Row]:
    """One row a model whose questions/s were measured."""
    return [
        {
            "model": row.model,
            "engine": row.engine,
            "kernel": row.kernel,
            "task": row.task,
            "questions": str(row.questions),
            "questions/s": row.status
            if row.questions_per_second is None
            else spread(row.questions_per_second),
        }
        for row in speed.evaluations
    ]


def facts(speed: Speed) -> list[str]:
    """What all rows share, in lines."""
    rate = speed.bandwidth.bytes_per_second
    turns = "in turns (A B A B)" if speed.in_turns else "one model and engine after the other"
    versions = ", ".join(f"{name} {version}" for name, version in speed.versions.items())
    return [
        f"device: {speed.on}" + ("" if speed.gpu else f", {speed.cpu_threads} threads"),
        f"dtype: {speed.dtype}; {speed.tokens} tokens decoded after the first;"
        f" image: {speed.image}",
        f"repeats: {speed.repeats} after {speed.warm_up} of warm-up, {turns}; seed {speed.seed}",
        f"bandwidth: {rate.median / 1e9:.4g} GB/s read and written"
        f" [{rate.low / 1e9:.4g}, {rate.high / 1e9:.4g}], a copy of"
        f" {speed.bandwidth.copied_bytes / 1e6:.0f} MB in this run",
        f"versions: {versions}",
    ]


def failures(speed: Speed) -> list[str]:
    """Why rows without figures have none, each reason once; then what was left out."""
    lines = [
        f"{row.model} in {row.engine}, {row.status}: {row.reason}"
        for row in speed.rows
        if row.status != "ok"
    ]
    peaks = [row.peak_bytes for row in speed.rows if row.status == "ok"]
    if peaks and not any(peaks) and not speed.gpu:
        lines.append("peak memory: not measured, as nobody counts it on a CPU")
    return [*dict.fromkeys(lines), *speed.notes]


def render(speed: Speed) -> str:
    """Render speed.md; a pure function of the record."""
    parts = ["# Speed", "\n".join(f"- {line}" for line in facts(speed))]
    parts += [markdown_table(speed_rows(speed)), markdown_table(engine_rows(speed))]
    if speed.evaluations:
        parts += ["Questions a second in option mode, as `qatbench eval` scores:"]
        parts.append(markdown_table(question_rows(speed)))
    if lines := failures(speed):
        parts.append("\n".join(f"- {line}" for line in lines))
    parts.append(_COLUMNS.format(repeats=speed.repeats, first=speed.models[0].model))
    return "\n\n".join(parts) + "\n"


def _row(row: SpeedRow) -> Row:
    first = row.first_token_seconds
    share = row.share_of_limit
    return {
        "model": row.model,
        "engine": row.engine,
        "batch": str(row.batch),
        "context": str(row.context),
        "decode tok/s": row.status
        if row.decode_tokens_per_second is None
        else spread(row.decode_tokens_per_second),
        "prefill tok/s": rate(row.prefill_tokens_per_second),
        "first ms": UNKNOWN if first is None else f"{1000 * first.median:.3g}",
        "x first": ratio(row.decode_to_first),
        "x plain": ratio(row.decode_to_plain),
        "cache MB": megabytes(row.cache_bytes),
        "peak MB": megabytes(row.peak_bytes)
        if row.peak_bytes is not None or row.status != "ok"
        else "not measured",
        "limit %": UNKNOWN if share is None else f"{100 * share:.1f}",
    }


def ratio(value: float | None) -> str:
    """Write 1.807 as 1.81."""
    return UNKNOWN if value is None else f"{value:.2f}"


def shown(rows: Sequence[Row], left: Sequence[str]) -> list[Row]:
    """Rows without the columns of `left`."""
    return [{key: cell for key, cell in row.items() if key not in left} for row in rows]
