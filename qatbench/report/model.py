"""The schema of comparison.json: what a report may say, and nothing it has to work out again.

Accuracies, differences and intervals are fractions; p-values are floats in [0, 1]; sizes are bytes
and durations seconds. "Question" is what is counted: one row of predictions.jsonl, or, where rows
carry `meta.group`, one group, right when all its rows are right.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Literal

from pydantic import Field

from qatbench.records import Record
from qatbench.report.details import Agreement, Changes, Claim, Noise, Recovery
from qatbench.report.speed_model import ArmSpeed

COMPARISON_VERSION: Literal[1] = 1
PTQ_METHODS = frozenset({"rtn", "gptq", "awq", "autoround"})
QAT_METHODS = frozenset({"qat", "grace"})
CONTROL_METHODS = frozenset({"sft", "kd"})  # trained without quantization

Family = Literal["16-bit", "PTQ", "QAT", "unknown"]
Setting = tuple[str, ...]  # the distinct values seen; one where all arms agree, none if unknown
Term = Literal["ce", "kd", "rcka", "gate", "beta"]
Part = Literal["gate", "kl", "kd", "rcka", "beta", "teacher", "tokens", "distillation", "training"]
Worth = Literal["helps", "hurts", "does not matter", "undecided"]


class WarningCode(StrEnum):
    """All the warnings there are; `ADVICE` says what to do about each."""

    ONE_SEED = "ONE_SEED"
    UNPARSED = "UNPARSED"
    ERRORS = "ERRORS"
    TIES = "TIES"
    AT_CHANCE = "AT_CHANCE"
    DIFFERENT_PROTOCOL = "DIFFERENT_PROTOCOL"
    DIFFERENT_SETTINGS = "DIFFERENT_SETTINGS"
    DIFFERENT_DATA = "DIFFERENT_DATA"
    DIFFERENT_GRID = "DIFFERENT_GRID"
    UNPAIRED_SEEDS = "UNPAIRED_SEEDS"
    NO_TRAINED_CONTROL = "NO_TRAINED_CONTROL"
    INTERSECTION = "INTERSECTION"
    CONTROL_IMAGES = "CONTROL_IMAGES"
    METRICS_DISAGREE = "METRICS_DISAGREE"
    BETA_AT_BOUND = "BETA_AT_BOUND"


ADVICE: dict[WarningCode, str] = {
    WarningCode.ONE_SEED: "training differs from seed to seed, and the intervals do not cover that:"
    " train at least three seeds before you publish a difference",
    WarningCode.UNPARSED: "responses without a recognisable letter count as not right: read some,"
    " or score with --mode options",
    WarningCode.ERRORS: "questions that crashed count as not right: read their `error` field, then"
    " evaluate again",
    WarningCode.TIES: "the best score was shared by several options and the first was taken:"
    " evaluate in float32 if there are many",
    WarningCode.AT_CHANCE: "the interval holds the score of a guess: differences between such arms"
    " say nothing about quantization",
    WarningCode.DIFFERENT_PROTOCOL: "the arms were asked or scored in different ways: evaluate them"
    " again with one --protocol and one --mode",
    WarningCode.DIFFERENT_SETTINGS: "dtype, device, batch size or versions differ, which can move a"
    " score by itself: evaluate again under one setting",
    WarningCode.DIFFERENT_DATA: "the data digests differ although ids and answers agree: check that"
    " questions and images are the same files",
    WarningCode.DIFFERENT_GRID: "the quantized arms differ in bits or group size: read accuracy"
    " beside bits/weight",
    WarningCode.UNPAIRED_SEEDS: "some seeds have no partner in the other arm: they count in the"
    " mean, but not in flips and per-seed p-values",
    WarningCode.NO_TRAINED_CONTROL: "a trained INT4 arm without a 16-bit arm trained on the same"
    " data credits quantization with what training did: add an sft arm",
    WarningCode.INTERSECTION: "the figures are of the shared questions only, and are not the"
    " benchmark's score",
    WarningCode.CONTROL_IMAGES: "pictures were left out or swapped: these are controls that show"
    " whether a model looks, not the benchmark's score",
    WarningCode.METRICS_DISAGREE: "the figures here are recomputed from predictions.jsonl; its"
    " metrics.json says otherwise: run eval or score again",
    WarningCode.BETA_AT_BOUND: "beta sat at one of its bounds, so it did not adapt: choose a"
    " budget `target` within the range that the distillation loss travels",
}


class ReportWarning(Record):
    """Something a reader must know before trusting a row."""

    code: WarningCode
    arms: tuple[str, ...]  # the arms it is about; empty: all
    detail: str  # the numbers behind it

    @property
    def advice(self) -> str:
        """What to do about it."""
        return ADVICE[self.code]


class CheckpointFacts(Record):
    """What the evaluation knew about the model it asked; None and () where it did not say."""

    method: str | None = None  # base, sft, kd, rtn, gptq, awq, autoround, qat, grace
    bits: int | None = None  # of the language model's linears
    group_size: int | None = None  # weights that share a scale
    label: str | None = None  # what the weights really are, e.g. "dequantized from Q4_1"
    checkpoint_bytes: int | None = None  # on disk, all files
    bits_per_weight: float | None = None  # of the language model's linears, scales included
    making_seconds: float | None = None  # mean over seeds, as the two below
    training_seconds: float | None = None
    calibration_seconds: float | None = None
    source_seconds: float | None = None  # making of the compared arms that it was made from
    samples_seen: int | None = None  # training samples, repeats counted
    peak_memory_bytes: int | None = None  # of making it, on its device; largest of the seeds
    device: str | None = None  # where it was made
    gpu: str | None = None  # its name
    notes: tuple[str, ...] = ()
    leakage: tuple[str, ...] = ()  # what was found out about test questions in its training data


class ArmResult(CheckpointFacts):
    """One arm on one task."""

    name: str  # its folder's name, with as much of the path as tells arms apart
    seeds: tuple[int, ...]  # 0 for a folder without seed-N subfolders
    fingerprints: tuple[str | None, ...]  # of each seed's evaluation
    n: int = Field(gt=0)  # questions
    rows: int = Field(gt=0)  # rows asked; more than n where rows form groups
    right: tuple[int, ...]  # per seed
    accuracies: tuple[float, ...]  # per seed: right / n
    accuracy: float  # mean over seeds
    low: float  # 95 % Wilson interval of n questions, each taken alone, around the mean accuracy
    high: float  # with several seeds as wide as with one: the same questions were asked again
    spread: float | None  # standard deviation over seeds (n - 1); None with one seed
    chance: float | None  # accuracy of a uniform guess; None where the options were not recorded
    unparsed: tuple[int, ...]  # rows per seed, as the two below
    errors: tuple[int, ...]
    ties: tuple[int, ...]
    predictions: tuple[str, ...] = ()  # file of each seed, relative to the comparison
    questions_per_second: float | None = None  # in option mode, measured by `qatbench speed`
    models: tuple[str | None, ...] = ()  # fingerprint of each seed's model
    speed: ArmSpeed | None = None  # measured by `qatbench speed`

    @property
    def family(self) -> Family:
        """PTQ, QAT (trained for its grid), 16-bit, or unknown when no method was recorded."""
        if self.method in PTQ_METHODS:
            return "PTQ"
        if self.method in QAT_METHODS:
            return "QAT"
        full = self.method is not None or (self.bits_per_weight or 0) >= 16
        return "16-bit" if full else "unknown"

    @property
    def grid(self) -> str:
        """Bits and group size in words; arms are ranked against each other within one grid."""
        return "unknown grid" if self.bits is None else f"{self.bits} bits g{self.group_size}"

    @property
    def cost_seconds(self) -> float | None:
        """Making it, and before it the compared arms that it was made from: source, teacher."""
        if self.making_seconds is None:
            return None
        return self.making_seconds + (self.source_seconds or 0.0)

    @property
    def gpu_hours(self) -> float | None:
        """Its cost where it was made on a GPU."""
        seconds, made_on = self.cost_seconds, (self.device or "").split(":")[0]
        return seconds / 3600 if made_on == "cuda" and seconds is not None else None


class SeedPair(Record):
    """One seed of an arm against one seed of its reference, question by question."""

    seed: int
    reference_seed: int
    lost: int  # the reference is right, the arm is not
    gained: int  # the arm is right, the reference is not
    p: float  # two-sided, exact: McNemar; sign flips by cluster where questions form any


class PairResult(Record):
    """Arm minus reference; correctness is averaged over seeds, question by question, first."""

    arm: str
    reference: str
    difference: float
    low: float  # percentile bootstrap over questions
    high: float
    p: float  # two-sided, exact: sign flips by question (McNemar with one seed each) or cluster
    p_holm: float  # adjusted over every pair of the comparison, all tasks together
    p_equivalence: float | None = None  # the larger of two one-sided tests at the margin
    p_equivalence_holm: float | None = None  # adjusted over the same pairs, a family of its own
    verdict: Literal["equivalent", "better", "worse", "undecided"]  # by the adjusted p-values
    n_needed: int  # questions for 80 % power to show equivalence within the margin
    seed_pairs: tuple[SeedPair, ...]  # equal seeds, or all with the only seed of either; may be ()
    lost: float | None  # mean over seed_pairs; None without any
    gained: float | None


class Ablation(Record):
    """What one part of GRACE is worth: an arm that has it against one that only lacks it.

    Below the parts of the method stand all of distillation together (grace against qat) and
    training on the grid (qat against the best PTQ arm), both on the grid of `full`.
    """

    part: Part
    without: str | None  # how it was left out, where that needs saying, e.g. "fixed at 0.5"
    full: str  # the arm with nothing switched off
    grid: str
    pair: PairResult  # with the part minus without it, on the seeds that both have
    shared_p: bool  # p_holm is that of `pairs` or `contests`, where this very pair stands too
    verdict: Worth
    variance: float  # of the questions' differences, correctness averaged over seeds
    n_to_decide: int  # questions for 80 % power to settle it if the difference is the one seen
    cost: float | None  # making without the part over making `full`; None if not comparable
    differing: tuple[str, ...] = ()  # settings beside the part; of parts of the method, only beta's
    # budget where the part changes the scale of the loss that it is about


class Definition(Record):
    """What was measured, so that another can measure the same."""

    task: str
    protocol: Setting
    mode: Setting
    n: int  # questions in every arm
    dropped: dict[str, int]  # questions per arm left out by --intersection; empty without it
    intersection: bool  # whether arms over different questions were cut to the shared ones
    text_only: bool | None  # no question has an image; None where it was not recorded
    images: Setting = ("shown",)  # or none, shuffled: controls
    data: dict[str, Setting]  # task:split -> digest
    prompt_form: Setting  # e.g. which chat template
    dtype: Setting
    device: Setting
    batch: Setting
    versions: dict[str, Setting]  # package -> version
    seeds: dict[str, tuple[int, ...]]  # arm -> seeds
    margin: float  # of equivalence, a fraction
    level: float  # of every interval
    bootstrap_draws: int
    bootstrap_seed: int
    family_size: int  # pairs that share the Holm adjustment
    ablation_family: int = 0  # ablations that share another; those with `shared_p` are not counted
    recipe: str | None
    model: Setting = ()  # what the arms without a method are: the 16-bit model
    kernel: Setting = ()  # class of the linear that multiplied
    cluster: str = "question"  # what is resampled: `--cluster`, and what of it stands alone


class TaskComparison(Record):
    """All arms on one task."""

    definition: Definition
    arms: tuple[ArmResult, ...]  # in the order asked for, the baseline included
    pairs: tuple[PairResult, ...]  # every other arm against the baseline
    contests: tuple[PairResult, ...]  # a grid each: best QAT against best PTQ on these questions
    claimed: tuple[PairResult, ...] = ()  # best GRACE against best PTQ and sft or kd, if not above
    warnings: tuple[ReportWarning, ...]
    ablations: tuple[Ablation, ...] = ()  # grid by grid
    not_ablated: tuple[str, ...] = ()  # grace arms that are no such pair, and why
    changes: tuple[Changes, ...] = ()  # of `pairs`, then of `contests` and `claimed`
    agreement: Agreement | None = None
    recovery: tuple[Recovery, ...] = ()
    noise: tuple[Noise, ...] = ()

    def arm(self, name: str) -> ArmResult:
        """Find the arm of that name; KeyError if there is none."""
        return {arm.name: arm for arm in self.arms}[name]

    def pair(self, name: str) -> PairResult | None:
        """Find that arm against the baseline; None for the baseline itself."""
        return next((pair for pair in self.pairs if pair.arm == name), None)

    def best(self, family: Family, grid: str | None = None) -> ArmResult | None:
        """Pick the most accurate arm of a family, of one grid if given; among equals the first."""
        arms = [arm for arm in self.arms if arm.family == family and grid in (None, arm.grid)]
        return max(arms, key=lambda arm: arm.accuracy, default=None)


class Stretch(Record):
    """Means over neighbouring optimizer steps and over seeds; None for terms that were off."""

    first: int
    last: int
    ce: float  # nats a token
    kd: float | None  # nats
    rcka: float | None  # 1 - CKA, mean over images
    gate: float | None
    beta: float | None


class Curve(Record):
    """One term at each of its course's points, to 5 significant digits; None where it was off."""

    mean: tuple[float | None, ...]  # over the neighbouring steps of a point and over seeds
    low: tuple[float | None, ...] = ()  # lowest seed's mean, and highest; () with one seed
    high: tuple[float | None, ...] = ()


class Course(Record):
    """How one arm's training went."""

    arm: str
    seeds: tuple[int, ...]
    stretches: tuple[Stretch, ...]
    points: tuple[float, ...] = ()  # mean step of each point of the curves; at most 60
    curves: dict[Term, Curve] = Field(default_factory=dict)  # of the terms that were on
    beta_range: tuple[float, float] | None = None  # lowest and highest beta of any step and seed
    beta_at_bound: float | None = None  # share of all steps at the controller's low or high


class Comparison(Record):
    """comparison.json: arms that answered the same questions, task by task."""

    schema_version: Literal[1] = COMPARISON_VERSION
    baseline: str  # the arm every other is compared with
    tasks: tuple[TaskComparison, ...]
    training: tuple[Course, ...] = ()  # of the arms whose train.jsonl is there
    claims: tuple[Claim, ...] = ()
