"""How good guesses are at misses: an expert that is in memory anyway is no merit."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict

from edge_moe.runtime.policy import EvictionPolicy
from edge_moe.runtime.predictors import Predictor
from edge_moe.runtime.replay import Room
from edge_moe.runtime.simulate import Replay


class LayerScore(BaseModel):
    """Guesses for one layer, over single tokens; nothing is read ahead."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    missed: int
    """Chosen experts that were not in memory."""
    guessed: int
    """Guessed experts that were not in memory."""
    right: int
    """... and that were chosen."""

    @property
    def recall(self) -> float:
        """Share of the misses that was guessed; 1.0 without any."""
        return self.right / self.missed if self.missed else 1.0

    @property
    def precision(self) -> float:
        """Share of the guesses that would have saved a miss; 1.0 without any."""
        return self.right / self.guessed if self.guessed else 1.0


class PredictorScore(BaseModel):
    """One predictor. The first layer is never guessed."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    predictor: str
    layers: tuple[LayerScore, ...]

    @property
    def total(self) -> LayerScore:
        """Over all layers, misses of the first included."""
        return LayerScore(
            missed=sum(layer.missed for layer in self.layers),
            guessed=sum(layer.guessed for layer in self.layers),
            right=sum(layer.right for layer in self.layers),
        )


def score_predictor(
    replay: Replay, room: Room, policy: type[EvictionPolicy], predictor: Predictor
) -> PredictorScore:
    """Replay with `predictor` looking on.

    Raises:
        InputError: no slot at all for a size, or too few for one step.
    """
    residents = replay.residents(room, policy)
    num_layers = len(replay.sizes)
    counts = [[0, 0, 0] for _ in range(num_layers)]
    guessed: set[int] = set()
    for ask in replay.asks(room.most_tokens):
        if not ask.is_decoding:
            residents.ask(ask.layer, ask.rows)
            guessed = set()
            continue
        layer = ask.layer
        missed = {row for row in ask.rows if (layer, row) not in residents}
        found = counts[layer]
        found[0] += len(missed)
        found[1] += len(guessed)
        found[2] += len(guessed & missed)
        residents.ask(layer, ask.rows)
        if layer == 0:
            predictor.begin(replay.token_id(ask))
        predictor.learn(layer, ask.rows)
        guessed = set()
        if layer + 1 < num_layers:
            rows = predictor.guess(layer, ask.rows)
            guessed = {row for row in rows if (layer + 1, row) not in residents}
    layers = [LayerScore(missed=m, guessed=g, right=r) for m, g, r in counts]
    return PredictorScore(predictor=predictor.name, layers=tuple(layers))
