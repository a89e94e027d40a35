"""Low-rank branches beside a package's weights, in the layout that PEFT writes. No torch.

    adapter.safetensors    base_model.model.MODULE.lora_A.weight [r, in], .lora_B.weight [out, r]
    adapter_config.json    PEFT's LoraConfig

A branch computes W x + (alpha / r) B A x (LoRA, arXiv:2106.09685, section 4.1), so it can be merged
into W and then costs nothing.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path

from edge_moe.errors import CheckpointError, PackageError
from edge_moe.package import ADAPTER_NAME, AdapterRecord, Package
from edge_moe.safetensors_header import read_header
from edge_moe.tensor_info import TensorInfo

ADAPTER_CONFIG_NAME = "adapter_config.json"
_NAME = re.compile(r"base_model\.model\.(.+)\.lora_([AB])\.weight")


@dataclass(frozen=True)
class BranchTensors:
    """Where the two factors of one branch lie."""

    module: str
    """The linear layer it stands beside, such as `model.layers.0.self_attn.o_proj`."""
    lora_a: TensorInfo
    """[r, in]"""
    lora_b: TensorInfo
    """[out, r]"""


def tensor_names(module: str) -> tuple[str, str]:
    """Names of (A, B) of the branch beside `module`."""
    prefix = f"base_model.model.{module}"
    return f"{prefix}.lora_A.weight", f"{prefix}.lora_B.weight"


def adapter_config(record: AdapterRecord, modules: list[str], base_model: str) -> str:
    """adapter_config.json: the fields of PEFT's LoraConfig that decide what is computed."""
    config = {
        "base_model_name_or_path": base_model,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "lora_alpha": record.alpha,
        "lora_dropout": 0.0,
        "peft_type": "LORA",
        "r": record.rank,
        "target_modules": sorted({module.rpartition(".")[2] for module in modules}),
        "task_type": "CAUSAL_LM",
        "use_dora": False,
        "use_rslora": False,
    }
    return json.dumps(config, indent=2) + "\n"


def read_branches(package: Package) -> list[BranchTensors]:
    """The branches of a package, by layer; none where it has no adapter. Reads headers only.

    Raises:
        PackageError: names or shapes that are not a LoRA of the rank that the manifest states.
    """
    record = package.manifest.adapter
    if record is None:
        return []
    path = package.folder / ADAPTER_NAME
    try:
        tensors = read_header(path)[0]
    except CheckpointError as error:
        raise PackageError(f"{error}; recover the package again") from None
    pairs: dict[str, dict[str, TensorInfo]] = {}
    for name, info in tensors.items():
        match = _NAME.fullmatch(name)
        if match is None:
            raise PackageError(f"{path}: {name!r} is not a LoRA tensor: recover the package again")
        pairs.setdefault(match.group(1), {})[match.group(2)] = info
    return [_branch(path, module, pair, record.rank) for module, pair in sorted(pairs.items())]


def _branch(path: Path, module: str, pair: dict[str, TensorInfo], rank: int) -> BranchTensors:
    shapes = {part: list(info.shape) for part, info in sorted(pair.items())}
    if set(pair) != {"A", "B"} or any(len(shape) != 2 for shape in shapes.values()):
        raise PackageError(f"{path}: {module} has {shapes}, expected A [r, in] and B [out, r]")
    if shapes["A"][0] != rank or shapes["B"][1] != rank:
        raise PackageError(
            f"{path}: {module} has {shapes}, the manifest states rank {rank}: "
            "recover the package again"
        )
    return BranchTensors(module, pair["A"], pair["B"])
