"""`OnnxSession`: a folder of `build --target onnx` in onnxruntime, ready to generate and to score.

Weights stay mapped from their files where a kernel reads them as they lie. The KV cache has one
buffer per layer for the longest sequence, which nodes extend in place; pages that no token has
reached are not in memory yet. Layers with a state of one size change that in place, too: kernels
have read what they need of it before they write.
"""

from __future__ import annotations

import time
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from edge_moe.budget import memory_terms
from edge_moe.errors import BudgetError, InputError, TargetError, install_command
from edge_moe.formats import DROP, EXACT
from edge_moe.json_files import read_json
from edge_moe.measurement import usable_cores
from edge_moe.onnx_folder import HEAD_NAME, MODEL_NAME, require_whole
from edge_moe.package import PLAN_NAME
from edge_moe.plan import Device, MemoryTerm, Plan
from edge_moe.runtime.allotment import context_length
from edge_moe.runtime.generate import FloatArray, Timing, TokenLoop
from edge_moe.runtime.onnx_library import PROVIDERS, import_onnxruntime, require_provider
from edge_moe.runtime.text_session import TextSession, Where
from edge_moe.runtime.tokenizer import load_tokenizer
from edge_moe.spec import ModelSpec
from edge_moe.units import format_bytes, round_up_bytes

_PASTS, _PRESENT = ("past_key_values.", "past."), "present."
"""What names of states start with, as inputs and as outputs; the rest is the same."""
_PAST_TOKENS = "past_tokens"
"""Name of the axis of keys and values that grows."""
_QUIET = 3  # onnxruntime's severity: errors only


class OnnxSession(TextSession):
    """The interface of `runtime.session.Session` that running, chatting and evaluating need."""

    def __init__(
        self,
        folder: Path,
        terms: list[MemoryTerm],
        runtime: Any,
        network: Any,
        context_tokens: int,
        device: Device,
    ) -> None:
        """Use `OnnxSession.open`."""
        self.folder = folder
        self.spec = ModelSpec.from_file(folder / "config.json")
        self.tokenizer = load_tokenizer(folder)
        self.context_tokens = context_tokens
        self.device = Where(device)
        self.timing = Timing()
        self.load_seconds = 0.0
        self.warnings: list[str] = []
        self.measured_terms: dict[str, int] = {}
        self._terms = terms
        self._runtime = runtime
        self._network = network
        self._head: Any = None
        """Opened by the first `logits`."""

    @classmethod
    def open(
        cls,
        folder: Path,
        *,
        context_tokens: int | None = None,
        device: str | None = None,
        budget_bytes: int | None = None,
        scored_tokens: int = 1,
    ) -> OnnxSession:
        """Load `folder`, on the device that its plan was made for unless `device` says another.

        The context defaults to the plan's. Nothing is paged: a budget holds the whole bill of this
        context, or nothing is loaded. `scored_tokens` positions have their logits held at once.

        Raises:
            BudgetError: the bill is larger than the budget.
            InputError: the folder is incomplete or damaged, or the device is not there.
            TargetError: quantised experts on cuda, where onnxruntime wants half precision.
            MissingExtraError: onnxruntime is not installed.
        """
        start = time.perf_counter()
        runtime = import_onnxruntime(f"running {folder}")
        plan = _plan_of(folder)
        spec = _spec_of(folder)
        context = context_length(spec, context_tokens or plan.context_tokens)
        where: Device = "cuda" if (device or plan.device) == "cuda" else "cpu"
        _check_device(folder, plan, where)
        bill = _Bill(plan, spec, where, scored_tokens)
        if budget_bytes is not None:
            bill.require(budget_bytes, context)
        require_whole(folder)
        network = _load(runtime, folder / MODEL_NAME, where)
        session = cls(folder, bill.terms(context), runtime, network, context, where)
        session.load_seconds = time.perf_counter() - start
        return session

    def logits(self, token_ids: Sequence[int]) -> npt.NDArray[np.float32]:
        """float32 [T, V]: row t predicts token t + 1.

        Raises:
            InputError: more tokens than the context holds.
        """
        if self._head is None:
            self._head = _load(self._runtime, self.folder / HEAD_NAME, self.device.type)
        return self.new_loop().logits(token_ids, self.spec.vocab_size)

    @property
    def eos_ids(self) -> set[int]:
        """Tokens that end a text, from generation_config.json or the tokenizer."""
        path = self.folder / "generation_config.json"
        found = None
        if path.exists():
            missing = f"{path} was removed: build {self.folder} again"
            content = read_json(path, InputError, missing=missing, damaged="build it again")
            found = content.get("eos_token_id") if isinstance(content, dict) else None
        if found is None:
            found = self.tokenizer.eos_token_id
        if found is None:
            return set()
        return set(found) if isinstance(found, list) else {found}

    def memory(self) -> list[MemoryTerm]:
        """The plan's bill, for the context of this session."""
        return list(self._terms)

    def statistics(self) -> None:
        """onnxruntime pages nothing that could be counted."""
        return None

    def close(self) -> None:
        """Let go of the model."""
        self._network = self._head = None

    def new_loop(self) -> _OnnxLoop:
        """A new sequence, with buffers of its own."""
        if self._network is None:
            raise RuntimeError("the session is closed")
        return _OnnxLoop(self._network, self._head, self.context_tokens, self.device.type)


@dataclass(frozen=True)
class _Bill:
    """What a folder takes at any context: the plan's terms, with another cache and workspace."""

    plan: Plan
    spec: ModelSpec
    device: Device
    scored_tokens: int

    def terms(self, context_tokens: int) -> list[MemoryTerm]:
        """The memory terms."""
        fresh = memory_terms(
            self.spec,
            forms=(),
            dense_bytes=0,
            context_tokens=context_tokens,
            device=self.device,
            target="onnx",
            runtime_bytes=0,
            runtime_source="assumed",
            scored_tokens=self.scored_tokens,
        )
        changed = {term.name: term for term in fresh if term.name in ("KV cache", "workspace")}
        return [changed.get(term.name, term) for term in self.plan.terms]

    def total_bytes(self, context_tokens: int) -> int:
        """Of all terms."""
        return sum(term.num_bytes for term in self.terms(context_tokens))

    def require(self, budget_bytes: int, context_tokens: int) -> None:
        """Refuse a context that does not fit.

        Raises:
            BudgetError: says which context does, if one does.
        """
        needed_bytes = self.total_bytes(context_tokens)
        if needed_bytes <= budget_bytes:
            return
        fitting = bisect_right(range(1, context_tokens), budget_bytes, key=self.total_bytes)
        shorter = f"use {fitting} tokens or less (--ctx), " if fitting else ""
        raise BudgetError(
            f"with {context_tokens} tokens of context {round_up_bytes(needed_bytes)} are needed, "
            f"more than the budget of {format_bytes(budget_bytes)}, and onnxruntime pages no "
            f"experts: {shorter}raise --budget, or plan and build again with a smaller one",
            needed_bytes,
        )


class _OnnxLoop(TokenLoop):
    """A sequence through onnxruntime."""

    def __init__(self, network: Any, head: Any, context_tokens: int, device: Device) -> None:
        """`head` gives the logits of all positions; needed for `keep_all` only."""
        super().__init__(context_tokens)
        self._network = network
        self._head = head
        self._device = device
        states = [value for value in network.get_inputs() if value.name.startswith(_PASTS)]
        self._states = {
            value.name: _buffer(value.shape, context_tokens, device) for value in states
        }
        self._growing = {value.name for value in states if _PAST_TOKENS in value.shape}

    def step(self, token_ids: Sequence[int], *, keep_all: bool = False) -> FloatArray:
        binding = self._network.io_binding()
        total = self.num_tokens + len(token_ids)
        ids = np.array([list(token_ids)], np.int64)
        binding.bind_cpu_input("input_ids", ids)
        binding.bind_cpu_input("attention_mask", np.ones((1, total), np.int64))
        for name, buffer in self._states.items():
            binding.bind_ortvalue_input(name, buffer)
            binding.bind_ortvalue_output(_PRESENT + name.partition(".")[2], buffer)
        binding.bind_output("hidden_states" if keep_all else "logits")
        self._network.run_with_iobinding(binding)
        self.num_tokens = total
        output: FloatArray = binding.get_outputs()[-1].numpy()
        if keep_all:
            (output,) = self._head.run(["logits"], {"hidden_states": output})
        rows: FloatArray = output[0]
        return rows

    def cache_bytes(self) -> int:
        """Of the tokens so far: later rows of the buffers were not touched."""
        sizes = {name: int(np.prod(buffer.shape())) * 4 for name, buffer in self._states.items()}
        growing = sum(size for name, size in sizes.items() if name in self._growing)
        return sum(sizes.values()) - growing + growing * self.num_tokens // self.context_tokens


def _buffer(shape: Sequence[Any], context_tokens: int, device: Device) -> Any:
    """Keys or values [1, m, context, d] of one layer, or a fixed state [1, ...], zero."""
    import onnxruntime

    sizes = [context_tokens if size == _PAST_TOKENS else size for size in shape[1:]]
    return onnxruntime.OrtValue.ortvalue_from_numpy(np.zeros([1, *sizes], np.float32), device)


def _plan_of(folder: Path) -> Plan:
    if not (folder / PLAN_NAME).is_file():
        raise InputError(
            f"{folder} holds {MODEL_NAME} but no {PLAN_NAME}: edge-moe runs what `edge-moe build "
            "--target onnx` wrote; use onnxruntime-genai for other models"
        )
    return Plan.load(folder / PLAN_NAME)


def _spec_of(folder: Path) -> ModelSpec:
    path = folder / "config.json"
    if not path.is_file():
        raise InputError(
            f"{folder} holds {MODEL_NAME} but no {path.name}, which `edge-moe build` wrote beside "
            "it: copy it there again, or build the folder again"
        )
    return ModelSpec.from_file(path)


def _check_device(folder: Path, plan: Plan, device: Device) -> None:
    """onnxruntime would compute such experts on the CPU, moving activations to and fro."""
    quantised = {form for row in plan.forms for form in row} - {DROP, EXACT}
    if device == "cuda" and quantised:
        raise TargetError(
            f"{folder} holds {', '.join(sorted(quantised))} experts in a float32 graph, which "
            "onnxruntime computes on the CPU only: use --device cpu, or build with --target native"
        )


def _load(runtime: Any, path: Path, device: Device) -> Any:
    """An InferenceSession of one graph on `device`.

    Raises:
        InputError: the files are damaged, or the device is not there.
    """
    options = runtime.SessionOptions()
    options.intra_op_num_threads = usable_cores()
    options.log_severity_level = _QUIET
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    wanted = PROVIDERS[device]
    if wanted not in runtime.get_available_providers():
        raise InputError(
            f"{path} is to run on {device}, but this build of onnxruntime has no {wanted}: "
            f"pip uninstall -y onnxruntime, then {install_command('onnx-gpu')}, or use --device cpu"
        )
    providers = [wanted] if device == "cpu" else [wanted, PROVIDERS["cpu"]]
    try:
        session = runtime.InferenceSession(str(path), options, providers=providers)
    except Exception as error:  # the library's errors share no base but Exception
        reason = str(error).splitlines()[0]
        raise InputError(f"{path}: onnxruntime cannot load it ({reason}): build it again") from None
    require_provider(session, device, path)
    return session
