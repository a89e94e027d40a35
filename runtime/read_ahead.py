"""`ReadAhead`: the predictors of one engine, and which of them is asked for the token at hand."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from edge_moe.runtime.interleaved_trial import FastestOf
from edge_moe.runtime.predictors import Predictor


class ReadAhead:
    """Belongs to the thread that decodes. Results do not depend on it."""

    def __init__(
        self,
        num_layers: int,
        predictors: Mapping[str, Predictor],
        trial: FastestOf | None = None,
    ) -> None:
        """Without a `trial` the first of `predictors` is asked for every token."""
        self._last_layer = num_layers - 1
        self._predictors = dict(predictors)
        self._first = next(iter(predictors))
        self._now: Predictor | None = None
        self._is_timed = False
        self.trial = trial
        """Whose guesses pay here, where that is being tried."""

    @property
    def is_on(self) -> bool:
        """Whether anybody is asked for this token."""
        return self._now is not None

    def start_token(self, token_id: int | None, *, is_settled: bool = True) -> None:
        """A single token is about to go through the layers.

        Without `is_settled` another trial is held, which this one would disturb.
        """
        self._is_timed = self.trial is not None and is_settled
        name: str | None = self._first
        if self.trial is not None and is_settled:
            name = self.trial.start_token()
        self._now = None if name is None else self._predictors[name]
        for predictor in self._predictors.values():
            predictor.begin(token_id)

    def end_token(self) -> None:
        """It is through. A predictor that has lost its trial does not even learn any more."""
        self._now = None
        if self.trial is None or not self._is_timed or self.trial.is_over:
            return
        self.trial.end_token()
        if self.trial.is_over:
            best = self.trial.best
            self._predictors = {} if best is None else {best: self._predictors[best]}

    def guess(self, layer: int, rows: Sequence[int]) -> list[int]:
        """Rows of layer `layer` + 1, now that `layer` has chosen `rows`.

        None after the last layer, and where nobody is asked.
        """
        for predictor in self._predictors.values():
            predictor.learn(layer, rows)
        if self._now is None or layer == self._last_layer:
            return []
        return self._now.guess(layer, rows)
