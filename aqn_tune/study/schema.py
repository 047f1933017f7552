"""The study: everything a user declares, in one YAML file."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import Field, field_serializer, field_validator, model_validator

from aqn_tune.errors import nearest
from aqn_tune.models.spec import ModelSpec
from aqn_tune.study.arms import CONTROL_NAMES, ArmSpec, ControlsSpec
from aqn_tune.study.base import Spec
from aqn_tune.study.looks import Looks
from aqn_tune.study.margin import GainMargin, Margin, SdMargin, read_margin, written_margin
from aqn_tune.study.scenario import ScenarioSpec
from aqn_tune.study.space import SpaceSpec
from aqn_tune.study.training import TrainingSpec
from aqn_tune.tasks import Task
from aqn_tune.tasks.word_problems import WordProblems

Name = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_.-]*$")]


class SearchSpec(Spec):
    """The exploration: one Optuna study and one ASHA rung table per scenario. It makes no claims."""

    space: SpaceSpec = Field(
        description="The search space; in YAML also the path of a file that holds it."
    )
    configs: int = Field(
        16, ge=0, description="Configs to try per scenario, beside the controls; 0: no search."
    )
    replicates: int = Field(3, ge=1, description="Search seeds per config, the same at every rung.")
    rungs: tuple[float, ...] = Field(
        (0.25, 0.5, 1.0),
        min_length=1,
        description="Shares of the steps at which ASHA decides; the last is 1.",
    )
    reduction_factor: float = Field(
        2.0, gt=1, description="ASHA keeps one in this many at each rung."
    )
    startup_configs: int = Field(
        4, ge=0, description="Configs sampled at random before TPE begins."
    )

    @field_validator("rungs")
    @classmethod
    def _rising(cls, rungs: tuple[float, ...]) -> tuple[float, ...]:
        if list(rungs) != sorted(set(rungs)) or rungs[0] <= 0 or rungs[-1] != 1.0:
            raise ValueError(f"got {list(rungs)}; rungs rise from above 0 and end at 1")
        return rungs


class ConfirmSpec(Spec):
    """The confirmation: finalists and controls on fresh seeds. The only stage that makes claims."""

    finalists: int = Field(2, ge=0, description="Best configs of each scenario that are confirmed.")
    replicates: int = Field(
        8, ge=6, description="Fresh seeds; below 6 the exact paired test cannot reach p = 0.05."
    )
    # Left out of dumps at its default, so that studies written before it existed keep their identity.
    looks: Looks = Field(
        (),
        exclude_if=lambda looks: not looks,
        description="Numbers of seeds at which the results are judged, the last of them `replicates`; it "
        "stops at the first that leaves nothing to decide. Each look is judged at an equal share of alpha; "
        "[]: one look, at the end.",
    )
    alpha: float = Field(
        0.05, gt=0, lt=0.5, description="Familywise error rate of the whole study."
    )
    margin: Margin = Field(
        GainMargin(),
        description="Smallest difference worth acting on: a number is a share of the gain G; else a "
        "mapping with its kind: gain, gap, absolute or sd.",
    )
    power: float = Field(
        0.8, ge=0.5, lt=1, description="Power at which the detectable effect is stated."
    )
    contrasts: tuple[tuple[str, str], ...] = Field(
        (
            ("finalist1", "finalist1_none"),
            ("finalist1", "finalist1_global"),
            ("global", "fault_only"),
            ("targeted", "fault_only"),
            ("targeted", "global"),
        ),
        description="Primary contrasts (arm, reference) in every scenario: the declared family.",
    )
    generation: int = Field(
        0,
        ge=0,
        description="Generation of confirm seeds; raise it to confirm afresh after seeing results.",
    )
    # Left out of dumps at its default, so that studies written before it existed keep their identity.
    generate: bool = Field(
        False,
        exclude_if=lambda generate: not generate,
        description="Let every confirmed model write its answers as well (greedy decoding), on each "
        "device it is deployed on, and report how many are right. Takes a few times as long as the "
        "evaluation beside it.",
    )
    export: Literal["finalists", "all", "none"] = Field(
        "finalists", description="Which confirmed adapters are exported as PEFT folders."
    )

    @field_validator("margin", mode="before")
    @classmethod
    def _read_margin(cls, value: Any) -> Any:
        return read_margin(value)

    @field_serializer("margin")
    def _written_margin(self, margin: Margin) -> float | dict[str, Any]:
        return written_margin(margin)


class ComputeSpec(Spec):
    """Where and how the work runs.

    Changes no number but for `gpus_per_worker`; on a GPU, and where a processor adds up in another order in
    other shapes, `pack_replicas` and the machine change its rounding.
    """

    workers: Annotated[int, Field(ge=1)] | Literal["auto"] = Field(
        "auto", description="Trials at a time; auto: one per CPU core."
    )
    pack_replicas: Annotated[int, Field(ge=1)] | Literal["auto"] = Field(
        "auto",
        description="Most runs that advance in lockstep, in one forward pass; auto: 8 on a CPU, on a GPU as "
        "many as make a pass of 16384 tokens. A worker whose memory does not hold them takes fewer at "
        "a time and says so.",
    )
    reuse: bool = Field(
        True,
        description="Train nothing twice: cells that train alike share a run, and search runs come "
        "from other studies of the output folder that have trained them with the same code.",
    )
    cpus_per_worker: float = Field(1.0, gt=0, description="CPUs that Ray reserves per trial.")
    gpus_per_worker: float = Field(
        0.0,
        ge=0,
        description="GPUs that Ray reserves per trial, which then trains there: with other random draws, "
        "and in a folder of its own. In YAML also auto: a share of one for LoRA on a small model, a whole "
        "one for full fine-tuning.",
    )
    address: str | None = Field(
        None, description="Ray cluster to join; null starts Ray on this machine."
    )
    max_failures: int = Field(2, ge=0, description="Times a trial is retried when its worker dies.")


class MechanismSpec(Spec):
    """What to look at on the way: where the gradient dies and what the faults do to activations.

    At each of its steps every training records gradient and activation statistics of every layer (one
    further forward and backward pass). It changes no number of the study.
    """

    steps: tuple[int, ...] = Field(
        min_length=1,
        description="Optimiser steps to look at, from 0; negative steps count from the end.",
    )

    def resolved(self, steps: int) -> tuple[int, ...]:
        """Return the steps from 0, sorted, in a training of `steps` steps.

        Raises ValueError when one does not exist or is named twice.
        """
        found = [step + steps if step < 0 else step for step in self.steps]
        for given, step in zip(self.steps, found, strict=True):
            if not 0 <= step < steps:
                raise ValueError(
                    f"mechanism.steps: there is no step {given} in a training of {steps} steps; "
                    f"allowed are 0 to {steps - 1}, or -1 to -{steps} from the end"
                )
        if len(set(found)) != len(found):
            raise ValueError(f"mechanism.steps: got {list(self.steps)}, which names a step twice")
        return tuple(sorted(found))


class DecisionRow(Spec):
    """One row of the decision matrix."""

    when: tuple[str | tuple[str, ...], ...] = Field(
        description="One verdict per contrast of `contrasts`: >, <, ~, ?, any, or a list of them."
    )
    say: str = Field(description="The conclusion.")


class DecisionSpec(Spec):
    """The decision matrix: what the verdicts of a scenario mean, said before they are known."""

    contrasts: tuple[tuple[str, str], ...] = Field(
        min_length=1, description="The contrasts whose verdicts are read, each a primary contrast."
    )
    rows: tuple[DecisionRow, ...] = Field(
        min_length=1, description="First match wins; a missing or unreachable row is an error."
    )


class Study(Spec):
    """A study: scenarios, arms, a search and a confirmation."""

    study: Name = Field(description="Name of the study; results go to <output>/<study>-<hash>.")
    description: str = Field("", description="What is asked, in a sentence or two.")
    seed: int = Field(0, ge=0, description="Study seed; every random draw derives from it.")
    model: ModelSpec = Field(ModelSpec(), description="The model to fine-tune.")
    task: Task = Field(WordProblems(), description="The data.")
    training: TrainingSpec = Field(TrainingSpec(), description="How every arm is trained.")
    eval_batch_size: int = Field(
        64, ge=1, description="Rows per evaluation batch; part of a tensor_max fault."
    )
    scenario: ScenarioSpec = Field(description="What the hardware does.")
    sweep: dict[str, tuple[Any, ...]] = Field(
        default_factory=dict,
        description="Dotted keys of `scenario` and the values they take; every combination is a scenario.",
    )
    controls: ControlsSpec = Field(ControlsSpec(), description="Arms that always run.")
    arms: dict[Name, ArmSpec] = Field(
        default_factory=dict, description="Further arms, confirmed like controls."
    )
    search: SearchSpec | None = Field(
        None, description="The exploration; null goes straight to confirmation."
    )
    confirm: ConfirmSpec = Field(ConfirmSpec(), description="The confirmation.")
    decisions: DecisionSpec | None = Field(None, description="What the verdicts mean.")
    # Left out of dumps where it is null, so that studies from before it keep their folder.
    mechanism: MechanismSpec | None = Field(
        None,
        exclude_if=lambda mechanism: mechanism is None,
        description="Steps at which gradients and activations are looked at; null: never.",
    )
    compute: ComputeSpec = Field(ComputeSpec(), description="Where it runs; enters no identity.")
    output: str = Field("runs", description="Folder that receives the study's folder.")

    @model_validator(mode="after")
    def _names(self) -> Study:
        for name in self.arms:
            taken = "a control" if name in CONTROL_NAMES else ""
            if name.startswith("finalist"):
                taken = "a finalist or its twin"
            elif re.fullmatch(r"c\d{3,}", name):
                taken = "a config of the search, which are c000, c001 and so on"
            if taken:
                raise ValueError(f"arms.{name}: the name is taken by {taken}; choose another")
        known = self.arm_names()
        pairs = self.confirm.contrasts
        # The default names finalists, which a study without a search has none of.
        declared = pairs != type(self.confirm).model_fields["contrasts"].default
        for arm, reference in pairs if declared else ():
            for name in (arm, reference):
                if name not in known:
                    raise ValueError(
                        f"confirm.contrasts: unknown arm {name!r}{nearest(name, known)}; "
                        f"allowed are {', '.join(known)}"
                    )
            if arm == reference or pairs.count((arm, reference)) > 1:
                raise ValueError(f"confirm.contrasts: {arm} vs {reference} compares nothing new")
        return self

    @model_validator(mode="after")
    def _looks_decide_something(self) -> Study:
        # With nothing to decide the first look would be the last, and the other seeds never run.
        if self.confirm.looks and not self.primary_contrasts():
            raise ValueError(
                f"confirm.looks: got {list(self.confirm.looks)}, and confirm.contrasts has no contrast whose "
                "arms this study has: there is nothing that a look could decide; declare a contrast, or "
                f"leave out the looks and all {self.confirm.replicates} seeds are run"
            )
        return self

    @model_validator(mode="after")
    def _observed_steps_exist(self) -> Study:
        self.observed_steps()
        return self

    @model_validator(mode="after")
    def _margin_is_measured(self) -> Study:
        if isinstance(self.confirm.margin, SdMargin):
            search = self.search if self.search and self.search.configs else None
            twins = ("_none", "_global")
            measured = [
                pair
                for pair in self.primary_contrasts()
                if not any(n.startswith("finalist") and n.endswith(twins) for n in pair)
            ]
            problem = ""
            if search is None:
                problem = "there is no search"
            elif search.replicates < 2:
                problem = f"search.replicates {search.replicates} gives no spread"
            elif not measured:
                problem = "no primary contrast has both of its arms in the search"
            if problem:
                raise ValueError(
                    f"confirm.margin: got kind sd, which takes the sd that the search measures, and "
                    f"{problem}; one of the confirmed pairs themselves would be no fixed margin: "
                    "give kind absolute or gap"
                )
        return self

    def observed_steps(self) -> tuple[int, ...]:
        """Return the steps at which every training is looked at, from 0 and sorted."""
        return self.mechanism.resolved(self.training.steps) if self.mechanism else ()

    def finalist_count(self) -> int:
        """Return how many finalists each scenario brings to the confirmation."""
        return min(self.confirm.finalists, self.search.configs) if self.search else 0

    def arm_names(self) -> tuple[str, ...]:
        """Return every arm of the confirmation: controls, own arms, finalists and their twins."""
        finalists = [f"finalist{i + 1}" for i in range(self.finalist_count())]
        twins = [f"{name}_{twin}" for name in finalists for twin in ("none", "global")]
        return (*self.controls.include, *self.arms, *finalists, *twins)

    def primary_contrasts(self) -> tuple[tuple[str, str], ...]:
        """Return the declared contrasts whose arms exist: without a search there is no finalist."""
        names = set(self.arm_names())
        return tuple(pair for pair in self.confirm.contrasts if names.issuperset(pair))
