"""`WatchedGraph`: a llama.cpp context that computes batches while its nodes are looked at."""

from __future__ import annotations

import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from edge_moe.errors import InputError
from edge_moe.runtime.held_interrupts import HeldInterrupts
from edge_moe.runtime.llama_api import BEGINNING_BYTES, LlamaApi
from edge_moe.runtime.llama_log import llama_log


class WatchedGraph(ABC):
    """llama.cpp calls back for the nodes that are wanted, and computes up to the next in one go."""

    def __init__(self, api: LlamaApi, path: Path, beginnings: tuple[bytes, ...] = (b"",)) -> None:
        """`path` is for messages. Give `_callback` to the context as its cb_eval.

        Nodes are wanted only if their name has one of these `beginnings`, of which 8 bytes count.
        There are 60 in a layer, so that it matters what it takes to leave one alone.
        """
        self._api = api
        self._words = frozenset(
            int.from_bytes(each[:BEGINNING_BYTES], sys.byteorder)
            for each in beginnings
            if len(each) >= BEGINNING_BYTES
        )
        self._short = tuple(each for each in beginnings if len(each) < BEGINNING_BYTES)
        self._path = path
        self._error: BaseException | None = None
        self._interrupts = HeldInterrupts()
        """They stop the graph at its next node.

        In a callback one would be raised before the first line, ctypes would drop it, and llama.cpp
        take the node for one that nobody wants.
        """
        # ctypes keeps no reference: the library would call freed memory
        self._callback = api.llama.ggml_backend_sched_eval_callback(self._on_node)

    @abstractmethod
    def _wants(self, name: str, tensor: int) -> bool:
        """Whether a node is wanted, before it is computed."""

    @abstractmethod
    def _receive(self, tensor: int, name: str) -> bool:
        """Look at a wanted node; False stops the graph."""

    def _compute(
        self,
        context: Any,
        token_ids: Sequence[int],
        start: int,
        wants_logits: Callable[[int], bool],
    ) -> None:
        """Compute tokens at positions `start`...; `wants_logits` is asked of each one's place.

        Raises:
            InputError: llama.cpp fails; or whatever a callback raised.
        """
        llama, count = self._api.llama, len(token_ids)
        batch = llama.llama_batch_init(count, 0, 1)
        try:
            batch.n_tokens = count
            for index, token_id in enumerate(token_ids):
                batch.token[index] = token_id
                batch.pos[index] = start + index
                batch.n_seq_id[index] = 1
                batch.seq_id[index][0] = 0
                batch.logits[index] = wants_logits(index)
            self._error = None
            with llama_log() as log, self._interrupts.hold():
                code = llama.llama_decode(context, batch)
        finally:
            llama.llama_batch_free(batch)
        if self._error is not None:
            raise self._error
        if code != 0:
            raise InputError(
                f"{self._path}: llama.cpp stops with code {code} ({log.last}): do the token ids "
                "belong to this file?"
            )

    def _on_node(self, tensor: int, is_asking: bool, _data: object) -> bool:
        """llama.cpp's callback: asked whether a node is wanted, then given it."""
        if self._error is not None or self._interrupts.has_come:
            return False
        if is_asking and not self._may_be_wanted(self._api.beginning(tensor)):
            return False
        try:
            name = self._api.name(tensor)
            return self._wants(name, tensor) if is_asking else self._receive(tensor, name)
        except BaseException as error:  # must not unwind through C
            self._error = error
            return False

    def _may_be_wanted(self, word: int) -> bool:
        """By the first bytes of a node's name."""
        if word in self._words:
            return True
        return bool(self._short) and word.to_bytes(BEGINNING_BYTES, sys.byteorder).startswith(
            self._short
        )
