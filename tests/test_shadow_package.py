"""Shadows in plans and packages: every byte, what is refused, and packages without them."""

from __future__ import annotations

import json
import shutil
import zlib
from pathlib import Path
from typing import Any

import pytest
from conftest import TinyCheckpoint
from hand_plan import hand_plan, tree
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from test_planner import plan_for

from edge_moe.checkpoint import Checkpoint
from edge_moe.converters import export_native
from edge_moe.converters.build import build
from edge_moe.converters.safetensors_writer import safetensors_file
from edge_moe.errors import (
    DiskSpaceError,
    FormError,
    InputError,
    PackageError,
    StatsError,
    TargetError,
)
from edge_moe.formats import DROP, expert_bytes, get_form, pack_expert
from edge_moe.package import MANIFEST_NAME, Package
from edge_moe.plan import Plan
from edge_moe.shadow import SHADOW_FORMS

FORMS = [["q8_0", "tq1_0", DROP, "q4_k", "bf16", "q8_0", DROP, "q4_k"]] * 2
"""tq1_0 is smaller than any shadow but one in tq1_0."""
NEED_SHADOWS = [0, 3, 4, 5, 7]


@pytest.fixture(scope="module")
def source(tiny_checkpoint: TinyCheckpoint) -> Checkpoint:
    return Checkpoint(tiny_checkpoint("qwen3_moe", wide=True))


@pytest.fixture(scope="module")
def built(source: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(hand_plan(source, FORMS), tmp_path_factory.mktemp("built") / "out", shadow="tq2_0")


@pytest.mark.parametrize("shadow", SHADOW_FORMS)
def test_shadows_are_packed_from_the_original_weights(
    source: Checkpoint, tmp_path: Path, shadow: str
) -> None:
    package = Package(build(hand_plan(source, FORMS), tmp_path / "out", shadow=shadow))
    assert package.manifest.shadow == package.plan.shadow == shadow
    for layer in package.manifest.layers:
        assert [record.expert_id for record in layer.experts] == [0, 1, 3, 4, 5, 7]
        assert [record.expert_id for record in layer.shadows] == NEED_SHADOWS
        with safe_open(package.folder / layer.shadows[0].file, "np") as opened:
            for record in layer.shadows:
                weights = source.expert(layer.layer_id, record.expert_id)
                wanted = pack_expert(shadow, *weights).tobytes()
                tensor = opened.get_tensor(f"layers.{layer.layer_id}.shadows.{record.expert_id}")
                assert tensor[: record.num_bytes].tobytes() == wanted
                assert not tensor[record.num_bytes :].any()
                with (package.folder / record.file).open("rb") as handle:
                    handle.seek(record.offset)
                    assert handle.read(record.num_bytes) == wanted
                assert record.offset % 4096 == 0
                assert zlib.crc32(wanted) == record.crc32
    # 5 of 2 layers, 3 matrices of 256 x 256
    one_bytes = 3 * 256 * get_form(shadow).row_bytes(256)
    assert package.plan.shadow_bytes == 10 * one_bytes
    assert f"| shadows ({shadow}) |" in (package.folder / "README.md").read_text()


def test_bodies_and_bill_are_the_same_with_and_without_shadows(
    source: Checkpoint, built: Path, tmp_path: Path
) -> None:
    plain = Package(build(hand_plan(source, FORMS), tmp_path / "plain"))
    shadowed = Package(built)
    assert plain.plan.terms == shadowed.plan.terms
    for one, other in zip(plain.manifest.layers, shadowed.manifest.layers, strict=True):
        found = [(each.expert_id, each.form, each.num_bytes, each.crc32) for each in one.experts]
        assert found == [(e.expert_id, e.form, e.num_bytes, e.crc32) for e in other.experts]
        assert one.shadows == []


def test_package_of_before_opens(source: Checkpoint, tmp_path: Path) -> None:
    folder = build(hand_plan(source, FORMS), tmp_path / "out")
    manifest = json.loads((folder / MANIFEST_NAME).read_text())
    del manifest["shadow"]
    for layer in manifest["layers"]:
        del layer["shadows"]
    (folder / MANIFEST_NAME).write_text(json.dumps(manifest))
    plan = json.loads((folder / "plan.json").read_text())
    del plan["shadow"], plan["shadow_bytes"]
    (folder / "plan.json").write_text(json.dumps(plan))
    package = Package(folder)
    assert package.manifest.shadow == package.plan.shadow == ""


def test_killed_build_resumes_to_the_same_bytes(
    source: Checkpoint, built: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def die(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        written = safetensors_file
        calls: list[Path] = []

        def failing(path: Path, *rest: Any, **more: Any) -> Any:
            calls.append(path)
            return written(path, *rest, **more) if len(calls) < 3 else die()

        patch.setattr(export_native, "safetensors_file", failing)
        with pytest.raises(KeyboardInterrupt):
            build(hand_plan(source, FORMS), tmp_path / "out", shadow="tq2_0")
    with pytest.raises(InputError, match="unfinished build of another plan"):
        build(hand_plan(source, FORMS), tmp_path / "out", shadow="tq1_0")
    build(hand_plan(source, FORMS), tmp_path / "out", shadow="tq2_0")
    found, wanted = tree(tmp_path / "out"), tree(built)
    assert found.keys() == wanted.keys()
    files = [name for name in found if name.endswith(".safetensors")]
    assert len(files) == 3
    assert all(found[name] == wanted[name] for name in files)


def test_disk_is_checked_for_shadows_too(
    source: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []

    def refuse(_: Path, needed: int, what: str) -> None:
        asked.append(needed)
        raise DiskSpaceError(what)

    monkeypatch.setattr(export_native, "require_free_disk", refuse)
    for shadow in (None, "tq2_0"):
        with pytest.raises(DiskSpaceError):
            build(hand_plan(source, FORMS), tmp_path / "out", shadow=shadow)
    padded = 3 * 256 * 66 + -(3 * 256 * 66) % 4096
    assert asked[1] - asked[0] == pytest.approx(10 * padded, abs=4 * 4096)  # headers, padded


def test_what_has_no_place_for_shadows_says_so(source: Checkpoint, tmp_path: Path) -> None:
    with pytest.raises(TargetError, match="gguf has no place for shadows.*leave out --shadow"):
        build(hand_plan(source, FORMS, "gguf"), tmp_path / "out", shadow="tq2_0", target="gguf")
    with pytest.raises(TargetError, match="plan again without --shadow"):
        plan = hand_plan(source, [["bf16"] * 8] * 2, "hf").model_copy(update={"shadow": "tq2_0"})
        build(plan, tmp_path / "out")
    with pytest.raises(InputError, match="'q4_k' is no form of a shadow: use one of tq2_0"):
        build(hand_plan(source, FORMS), tmp_path / "out", shadow="q4_k")


def test_rows_that_do_not_fit_name_the_form_that_does(
    tiny_checkpoint: TinyCheckpoint, tmp_path: Path
) -> None:
    narrow = Checkpoint(tiny_checkpoint("qwen3_moe"))
    plan = hand_plan(narrow, [["bf16"] * 8] * 2)
    with pytest.raises(FormError, match=r"tq2_0 does not fit experts of 64 x 64.*q2_0 of 64"):
        build(plan, tmp_path / "out", shadow="tq2_0")
    assert Package(build(plan, tmp_path / "out", shadow="q2_0")).manifest.shadow == "q2_0"


# -- untrusted manifests --------------------------------------------------------------------------


def _opened_with(built: Path, folder: Path, manifest: dict[str, Any]) -> Package:
    if not folder.exists():
        shutil.copytree(built, folder)
    (folder / MANIFEST_NAME).write_text(json.dumps(manifest))
    return Package(folder)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_changed_shadow_records_never_open(
    data: st.DataObject, built: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Whatever a field says: it is refused, or the record lies inside its file, in its form."""
    manifest = json.loads((built / MANIFEST_NAME).read_text())
    layer = manifest["layers"][data.draw(st.integers(0, 1))]
    record = layer["shadows"][data.draw(st.integers(0, len(NEED_SHADOWS) - 1))]
    field = data.draw(st.sampled_from(sorted(record)))
    values = {
        "expert_id": st.integers(-2, 2**70),
        "form": st.sampled_from(["tq1_0", "q2_0", DROP, "bf16", "", "x/y"]),
        "file": st.sampled_from(["../plan.json", "/etc/passwd", "", "none", "plan.json", "."]),
        "offset": st.one_of(st.integers(-(2**70), 2**70), st.integers(0, 300).map((4096).__mul__)),
        "num_bytes": st.integers(-(2**70), 2**70),
        "crc32": st.integers(-(2**40), 2**40),
    }
    value = data.draw(values[field].filter(lambda found: found != record[field]))
    record[field] = value
    folder = tmp_path_factory.getbasetemp() / "mutated"
    try:
        package = _opened_with(built, folder, manifest)
    except PackageError:
        return
    assert field in ("offset", "crc32")  # what only the checksum can tell
    for each in package.manifest.layers:
        for shadow in each.shadows:
            end = shadow.offset + shadow.num_bytes
            assert 0 <= shadow.offset and end <= (folder / shadow.file).stat().st_size


@pytest.mark.parametrize("shadow", ["", "q4_0", "drop", "nonsense", "tq1_0", "q2_0"])
def test_another_form_of_shadows_is_refused(built: Path, tmp_path: Path, shadow: str) -> None:
    manifest = json.loads((built / MANIFEST_NAME).read_text()) | {"shadow": shadow}
    with pytest.raises(PackageError, match="build the package again"):
        _opened_with(built, tmp_path / "out", manifest)


def test_missing_shadows_are_refused(built: Path, tmp_path: Path) -> None:
    manifest = json.loads((built / MANIFEST_NAME).read_text())
    del manifest["layers"][1]["shadows"][2]
    with pytest.raises(PackageError, match=r"layer 1 lists shadows of the experts \[0, 3, 5, 7\]"):
        _opened_with(built, tmp_path / "out", manifest)


# -- plans ----------------------------------------------------------------------------------------


def _half(source: Checkpoint) -> int:
    whole = plan_for(source, 10**12)
    return whole.total_bytes - whole.term("experts").num_bytes * 7 // 8


def test_plan_states_what_shadows_take(source: Checkpoint) -> None:
    plain = plan_for(source, 10**12)
    plan = plan_for(source, 10**12, shadow="tq2_0")
    assert (plan.forms, plan.terms) == (plain.forms, plain.terms)
    assert plan.shadow_bytes == 16 * expert_bytes("tq2_0", 256, 256)
    assert Plan.model_validate_json(plan.model_dump_json()) == plan


def test_pruned_experts_stay_as_their_own_shadows(source: Checkpoint) -> None:
    budget = _half(source)
    pruned = plan_for(source, budget)
    assert any(DROP in row for row in pruned.forms)
    plan = plan_for(source, budget, shadow="tq2_0", drops_none=True)
    assert not any(DROP in row for row in plan.forms)
    assert plan.total_bytes <= budget
    own = sum(form == "tq1_0" for row in plan.forms for form in row)
    assert own > 0
    assert plan.shadow_bytes == (16 - own) * expert_bytes("tq2_0", 256, 256)


def test_plans_that_cannot_have_shadows(source: Checkpoint) -> None:
    from fake_stats import fake_stats

    with pytest.raises(TargetError, match="target gguf has no place for shadows"):
        plan_for(source, 10**12, "gguf", shadow="tq2_0")
    with pytest.raises(InputError, match="'q8_0' is no form of a shadow"):
        plan_for(source, 10**12, shadow="q8_0")
    stats = fake_stats(source, forms=(DROP, "q4_k", "q8_0"))
    with pytest.raises(StatsError, match="smallest form that was measured is q4_k, larger than"):
        plan_for(source, 10**12, shadow="tq2_0", drops_none=True, stats=stats)
