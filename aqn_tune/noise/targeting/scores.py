"""Multipliers from the scores that a diagnosis gives to the layers."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Literal

from pydantic import Field, ValidationError, model_validator

from aqn_tune.errors import UserError
from aqn_tune.noise.targeting.base import TargetingSpec
from aqn_tune.noise.targeting.per_layer import PerLayer, spread


class Scores(TargetingSpec):
    """More noise where a layer's score is high, or less: m_k = (s_k / mean(s)) ** alpha.

    The scores s_k >= 0 come from a diagnosis of the hardware and stand in the study (`values`) or in
    a JSON file (`file`). alpha > 0 is the "variable" policy of the work that AQN's layer multipliers
    come from, alpha < 0 its inverse as a power law; `map: inverse_linear` is that work's own inverse,
    2 - s_k / mean(s), which needs every score to be at most twice the mean.

    A file is read whenever the noise is resolved: its numbers, not its name, enter the identity of
    a training, so trainings with another file content are other trainings. The study itself keeps
    the name only; write `values` where the study must be whole by itself.
    """

    kind: Literal["scores"] = "scores"
    values: PerLayer | None = Field(
        None, description="One score per layer, or a map of every layer number to its score."
    )
    file: str | None = Field(
        None, description="Path of a JSON file that holds such a list or map, in place of `values`."
    )
    map: Literal["power", "inverse_linear"] = Field(
        "power", description="power: (s / mean) ** alpha; inverse_linear: 2 - s / mean."
    )
    alpha: float | None = Field(
        None,
        allow_inf_nan=False,
        description="Exponent of map power: above 0 more noise at high scores, below 0 less; default 1.",
    )
    ceiling: bool = Field(
        False, description="Divide by the largest multiplier, so that no layer exceeds sigma."
    )

    @model_validator(mode="after")
    def _consistent(self) -> Scores:
        if (self.values is None) == (self.file is None):
            got = "neither" if self.file is None else "both"
            raise ValueError(f"got {got}; write exactly one of `values` and `file`")
        if self.map == "inverse_linear" and self.alpha is not None:
            raise ValueError("alpha has no effect with map inverse_linear; remove it")
        return self

    def multipliers(self, layer_count: int, fault_layers: tuple[int, ...]) -> tuple[float, ...]:
        """Return the mapped scores; see `TargetingSpec.multipliers`."""
        values = self._read() if self.values is None else self.values
        scores = spread(values, layer_count, name="targeting scores", default=None)
        if not any(scores):
            raise UserError("targeting scores: every score is 0, which favours no layer")
        try:
            mean = math.fsum(scores) / layer_count
            found = tuple(self._mapped(layer, score / mean) for layer, score in enumerate(scores))
        except (OverflowError, ZeroDivisionError):
            raise UserError(
                f"targeting scores: scores from {min(scores):g} to {max(scores):g} with alpha "
                f"{self.alpha if self.alpha is not None else 1.0:g} leave the range of numbers"
            ) from None
        return tuple(m / max(found) for m in found) if self.ceiling else found

    def _mapped(self, layer: int, ratio: float) -> float:
        """Return the multiplier of a layer whose score is `ratio` times the mean."""
        if self.map == "inverse_linear":
            if ratio > 2:
                raise UserError(
                    f"targeting scores: the score of layer {layer} is {ratio:.3g} times the mean; "
                    "map inverse_linear allows at most 2: use map power with alpha below 0"
                )
            return 2.0 - ratio
        alpha = 1.0 if self.alpha is None else self.alpha
        if ratio == 0 and alpha < 0:
            raise UserError(
                f"targeting scores: the score of layer {layer} is 0, which has no power {alpha:g}; "
                "use map inverse_linear, or alpha of at least 0"
            )
        return float(ratio**alpha)

    def _read(self) -> tuple[float, ...] | dict[int, float]:
        """Return the content of `file`, held to the same rules as `values`."""
        path = Path(str(self.file)).expanduser()
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise UserError(
                f"targeting scores: cannot read {path} ({error.strerror}); relative paths start at "
                f"{Path.cwd()}"
            ) from None
        except ValueError as error:
            raise UserError(f"targeting scores: {path} is no JSON: {error}") from None
        if not isinstance(content, list | dict):
            raise UserError(
                f"targeting scores: {path} holds a {type(content).__name__}; allowed are a list with "
                "one number per layer, or a map of layer to number"
            )
        try:
            values = Scores.model_validate({"values": content}).values
        except ValidationError as error:
            # One complaint of the list and one of the map: the one about what the file holds.
            item = error.errors(include_url=False)[-1 if isinstance(content, dict) else 0]
            text = item["msg"].removeprefix("Value error, ").replace("Input should be", "needs")
            where = f"at {item['loc'][2]}: " if len(item["loc"]) > 2 else ""
            raise UserError(f"targeting scores: {path}: {where}{text}") from None
        assert values is not None  # just validated
        return values
