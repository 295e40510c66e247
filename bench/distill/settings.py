"""What a run is made of, and the variants that it compares."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, NamedTuple

from drift_gate import DriftGate
from drift_gate.choices import Advantage, Aggregate, Granularity

PASS_AT = 8  # k of pass@k


@dataclasses.dataclass(frozen=True)
class Settings:
    """Everything that decides a run's figures; stored beside them, and read again to resume."""

    steps: int = 32
    seeds: int = 1  # 0, 1, ... from `seed` on
    seed: int = 0
    epochs: tuple[int, ...] = (2,)
    extra: bool = False
    block_size: int = 64
    learning_rate: float = 2e-4
    warmup: int = 5  # rollout batches until the learning rate is whole
    gradient_norm: float = 1.0  # to which longer gradients are cut
    clip: float = 0.2  # of the ratio in OPD, either way
    advantage: Advantage = "old"  # of OPD; "current" is renewed at every optimiser step
    tau: float = 1.0  # of all gates, as the next two
    aggregate: Aggregate = "mean"
    sample_every: int = 1
    variant: tuple[str, ...] = ()  # names of those to run; all, if there are none
    prompts: int = 8  # of a rollout batch
    samples: int = 8  # responses to a prompt
    minibatch: int = 32  # responses of an optimiser step
    top_k: int = 32
    temperature: float = 1.0
    top_p: float = 0.9
    max_tokens: int = 192  # of a response
    problems: int = 32  # of a benchmark
    evaluation_samples: int = 16  # responses to each of them
    student: str | None = None
    teacher: str | None = None
    train: str | None = None
    eval: tuple[str, ...] = ()
    device: str = "cpu"
    backend: str = "auto"
    compile: bool = False  # the student's layers, while it trains; sums are of another order

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Settings:
        """Of `to_json`."""
        lists = {name: tuple(value) for name, value in data.items() if isinstance(value, list)}
        return cls(**{**data, **lists})

    def model_paths(self) -> tuple[Path | None, Path | None]:
        """Of the student and the teacher; None for the shipped one."""
        return tuple(path and Path(path) for path in (self.student, self.teacher))  # type: ignore


class Variant(NamedTuple):
    """A loss, a gate or none, and where it is given its own number of reuse epochs."""

    name: str
    loss: str  # "opd" or "lsm"
    gate: DriftGate | None
    baseline: str | None = None  # the variant without the gate
    epochs: int | None = None


class Job(NamedTuple):
    """One training run."""

    variant: Variant
    epochs: int
    seed: int

    @property
    def key(self) -> str:
        """Its name among files."""
        words = self.variant.name.lower().replace(" + ", "_").replace(" ", "-")
        return f"{words}_e{self.epochs}_s{self.seed}"


def variants(settings: Settings) -> list[Variant]:
    """The paper's six, and with `extra` what it does not try, each for OPD."""
    size = settings.block_size
    found = []

    def gate(granularity: Granularity = "block", **own: Any) -> DriftGate:
        common = dict(
            block_size=size, tau=settings.tau, aggregate=settings.aggregate,
            sample_every=settings.sample_every,
        )  # fmt: skip
        return DriftGate(granularity, **(common | own))

    for loss in ("opd", "lsm"):
        plain = loss.upper()
        found += [
            Variant(plain, loss, None),
            Variant(f"{plain} + Block{size}", loss, gate(), plain),
            Variant(f"{plain} + NewlineSpan", loss, gate("span"), plain),
        ]
    if settings.extra:
        gates = {"Token": gate("token"), "Sequence": gate("sequence")}
        for aggregate in ("mean_abs", "rms", "max_abs"):
            gates[f"Block{size} {aggregate}"] = gate(aggregate=aggregate)
        gates[f"Block{size} every 8th"] = gate(sample_every=8)
        for other in (size // 4, size // 2, size * 2):
            gates[f"Block{other}"] = gate(block_size=other)
        found += [Variant(f"OPD + {name}", "opd", own, "OPD") for name, own in gates.items()]
        more = 2 * max(settings.epochs)
        reused = f"OPD {more} epochs"
        found += [
            Variant(reused, "opd", None, None, more),
            Variant(f"{reused} + Block{size}", "opd", gate(), reused, more),
        ]
    return found


def jobs(settings: Settings) -> list[Job]:
    """Every run: seeds outermost, so that an interrupted study is balanced."""
    return [
        Job(variant, epochs, seed)
        for seed in range(settings.seed, settings.seed + settings.seeds)
        for number in settings.epochs
        for variant in variants(settings)
        if not settings.variant or variant.name in settings.variant
        for epochs in [variant.epochs or number]
        if variant.epochs is None or number == settings.epochs[0]
    ]
