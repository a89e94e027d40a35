"""Whether the logits of two models can be compared, token by token."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from edge_moe.errors import InputError

_PROBE = 'The answer is 12.\n\tdef f(x):  # "naïve" {1: [2, 3]} SELECT *'


class HasTokenizer(Protocol):
    """A model, as far as it is asked here."""

    @property
    def tokenizer(self) -> Any: ...


def check_same_tokenizer(models: Mapping[str, HasTokenizer]) -> None:
    """Compare the token ids of a probe text.

    Raises:
        InputError: two models split it differently, so their logits cannot be compared.
    """
    ids = {
        name: list(model.tokenizer.encode(_PROBE, add_special_tokens=False))
        for name, model in models.items()
    }
    first = next(iter(ids))
    for name, found in ids.items():
        if found != ids[first]:
            raise InputError(
                f"{first} and {name} have different tokenizers (a probe text of {len(_PROBE)} "
                f"characters gives {len(ids[first])} and {len(found)} tokens): "
                "compare models of the same origin"
            )


def check_same_vocabulary(
    name: str, logits: npt.NDArray[np.float32], base_logits: npt.NDArray[np.float32]
) -> None:
    """Compare the shapes of logits.

    Raises:
        InputError: one model has more tokens than the other.
    """
    if logits.shape != base_logits.shape:
        raise InputError(
            f"{name} has a vocabulary of {logits.shape[-1]} tokens, the reference of "
            f"{base_logits.shape[-1]}: compare models of the same origin"
        )
