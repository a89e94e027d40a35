"""`run` and `eval` on an ONNX folder: the native session's text and scores, and refusals."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import TinyCheckpoint
from hand_plan import hand_plan, uniform_forms
from peak_memory import needs_proc

pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")

from onnx_runs import (  # noqa: E402
    RECURRENT,
    SPECIAL,
    exact_error,
    planned_model,
    reference_logits,
)

from edge_moe.budget import Setting  # noqa: E402
from edge_moe.checkpoint import Checkpoint  # noqa: E402
from edge_moe.cli import run  # noqa: E402
from edge_moe.converters.build import build  # noqa: E402
from edge_moe.errors import InputError, MissingExtraError, TargetError  # noqa: E402
from edge_moe.onnx_folder import (  # noqa: E402
    CHECKSUMS_NAME,
    OnnxOptions,
    require_whole,
    write_checksums,
)
from edge_moe.overhead import tokenizer_bytes  # noqa: E402
from edge_moe.plan import Plan  # noqa: E402
from edge_moe.runtime import onnx_library  # noqa: E402
from edge_moe.runtime.evaluate import evaluate, open_model  # noqa: E402
from edge_moe.runtime.onnx_session import OnnxSession  # noqa: E402
from edge_moe.runtime.session import Session  # noqa: E402
from edge_moe.runtime.skipping import parse_skip  # noqa: E402

FORMS = [["int4_b64"] * 4 + ["int8_row"] * 2 + ["drop"] * 2, ["int8_row"] * 8]


@pytest.fixture(scope="module")
def folders(
    tiny_checkpoint: TinyCheckpoint, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    """One plan built natively and as ONNX, and its source."""
    source, root = tiny_checkpoint("olmoe"), tmp_path_factory.mktemp("built")
    plan = hand_plan(Checkpoint(source), FORMS)
    build(plan, root / "native", model=source)
    onnx = hand_plan(Checkpoint(source), FORMS, "onnx")
    build(onnx, root / "onnx", model=source, onnx=OnnxOptions(is_exact=True))
    return {"source": source, "native": root / "native", "onnx": root / "onnx"}


def test_logits_over_several_chunks(folders: dict[str, Path]) -> None:
    tokens = np.random.default_rng(3).integers(1, 250, (1, 400))
    plan = hand_plan(Checkpoint(folders["source"]), FORMS)
    expected = reference_logits(planned_model(plan, folders["source"]), tokens)
    with OnnxSession.open(folders["onnx"], context_tokens=399) as session:
        found = session.logits(tokens[0, :-1].tolist())
        with pytest.raises(InputError, match="400 tokens do not fit"):
            session.logits(tokens[0].tolist())
    assert np.abs(found - expected).max() < 1e-5 * np.abs(expected).max()


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_text_is_the_native_runtimes(folders: dict[str, Path], temperature: float) -> None:
    options: dict[str, Any] = {"max_new_tokens": 24, "temperature": temperature, "top_p": 0.9}
    with Session.open(folders["native"]) as native, OnnxSession.open(folders["onnx"]) as session:
        for seed in range(3):
            wanted = "".join(native.generate("one two", seed=seed, **options))
            assert "".join(session.generate("one two", seed=seed, **options)) == wanted
        assert session.timing.generated_tokens == native.timing.generated_tokens
        assert session.timing.cache_bytes == native.timing.cache_bytes
        stop = next(letter for letter in wanted if letter.isprintable())
        stopped = "".join(session.generate("one two", seed=2, stop=[stop], **options))
        assert stopped == wanted.split(stop)[0]
        assert session.timing.stop_reason == "stop"


@pytest.mark.parametrize("family", (*RECURRENT, *SPECIAL))
def test_fixed_states_last_over_chunks_and_steps(
    family: str, tiny_checkpoint: TinyCheckpoint, tmp_path: Path
) -> None:
    """Two chunks of a prompt, then token by token: the logits of one pass over all of it."""
    source = tiny_checkpoint(family)
    checkpoint = Checkpoint(source)
    plan = hand_plan(checkpoint, uniform_forms(checkpoint, 6, "f32"), "onnx")
    build(plan, tmp_path / "out", model=source)
    tokens = np.random.default_rng(3).integers(1, 250, (1, 300))
    expected = reference_logits(planned_model(plan, source), tokens)
    limit = exact_error(family) * np.abs(expected).max()
    with OnnxSession.open(tmp_path / "out", context_tokens=320) as session:
        assert np.abs(session.logits(tokens[0, :-1].tolist()) - expected).max() < limit
        loop = session.new_loop()
        prompt = loop.prefill(tokens[0, :290].tolist())
        steps = [prompt, *(loop.step([int(each)])[0] for each in tokens[0, 290:-1])]
        assert np.abs(np.stack(steps) - expected[289:]).max() < limit
        spec, held = checkpoint.spec, loop.cache_bytes()
        growing = (spec.num_layers - spec.num_state_layers) * loop.num_tokens * 4
        assert held >= growing * (spec.kv_key_width + spec.kv_value_width)
        setting = Setting(checkpoint, "onnx", "cpu", loop.num_tokens, (0, "assumed"))
        (term,) = [each for each in setting.bill(plan.forms) if each.name == "KV cache"]
        assert held <= term.num_bytes  # whose convolutions are a token longer
        if family not in RECURRENT:
            assert held == term.num_bytes


def test_chat_template_and_end_of_text(folders: dict[str, Path], tmp_path: Path) -> None:
    folder = shutil.copytree(folders["onnx"], tmp_path / "chat")
    path = folder / "tokenizer_config.json"
    template = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"chat_template": template}))
    with OnnxSession.open(folder) as session:
        assert session.has_chat_template
        text = "".join(session.generate([{"role": "user", "content": "hi"}], max_new_tokens=8))
        assert text == "".join(session.generate("<user>hi", max_new_tokens=8))
        first = session.generate_ids(session.tokenizer.encode("<user>hi"), 1, stop_at_eos=False)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": first}))
    with OnnxSession.open(folder) as session:
        assert not "".join(session.generate("<user>hi", max_new_tokens=8))
        assert session.timing.stop_reason == "eos"


def test_eval_measures_the_divergence_of_the_plan(folders: dict[str, Path]) -> None:
    source = folders["source"]
    (onnx,) = evaluate(folders["onnx"], source, ["code"], max_windows=2, window_tokens=64)
    (native,) = evaluate(folders["native"], source, ["code"], max_windows=2, window_tokens=64)
    assert onnx.model_kind == "onnx" and onnx.comparison and native.comparison
    assert onnx.comparison.mean_kld.value == pytest.approx(
        native.comparison.mean_kld.value, rel=1e-3
    )
    with pytest.raises(TargetError, match="cannot skip experts"):
        open_model(folders["onnx"], context_tokens=64, skip=parse_skip("top-p=0.9"))


def test_run_prints_the_answer_and_records(
    folders: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = str(folders["onnx"])
    assert run(["run", folder, "--prompt", "one", "--max-new-tokens", "4", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["model_kind"] == "onnx" and found["generated_tokens"] == 4
    assert found["measured_terms"]["KV cache"] > 0
    assert run(["run", folder, "--prompt", "one", "--max-new-tokens", "4", "--record"]) == 0
    assert list((folders["onnx"] / "measurements").glob("run-*.json"))


def test_options_of_paging_are_refused(
    folders: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["run", str(folders["onnx"]), "--prompt", "a", "--ram", "1GB", "--slots", "4"]
    assert run(command) == 2
    assert "leave out --slots, --ram, or build with --target native" in capsys.readouterr().err
    assert run([*command[:4], "--linear-map", "m.safetensors"]) == 2
    assert "leave out --linear-map, or build" in capsys.readouterr().err


def test_a_budget_holds_the_bill_or_nothing_is_loaded(
    folders: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    """The bill is the plan's with this session's cache; the context that is named does fit."""
    source = Checkpoint(folders["source"])
    plan = hand_plan(source, FORMS, "onnx")
    terms = Setting(source, "onnx", "cpu", 256, (10**6, "assumed")).bill(plan.forms)
    folder = shutil.copytree(folders["onnx"], folders["onnx"].with_name("billed"))
    plan.model_copy(update={"terms": terms, "budget_bytes": 10**9}).save(folder / "plan.json")
    with OnnxSession.open(folder, context_tokens=256) as session:
        assert session.memory() == terms
    total_bytes = sum(term.num_bytes for term in terms)
    command = ["run", str(folder), "--prompt", "a", "--raw", "--max-new-tokens", "2", "--ctx"]
    assert run([*command, "256", "--budget", f"{total_bytes}B"]) == 0
    capsys.readouterr()
    assert run([*command, "256", "--budget", f"{total_bytes - 1}B"]) == 3
    message = capsys.readouterr().err
    found = re.search(r"use (\d+) tokens or less", message)
    assert found is not None and 200 < int(found[1]) < 256
    assert run([*command, found[1], "--budget", f"{total_bytes - 1}B"]) == 0
    assert run([*command, str(int(found[1]) + 1), "--budget", f"{total_bytes - 1}B"]) == 3
    capsys.readouterr()
    assert run([*command, "256", "--budget", "1MB"]) == 3
    assert "tokens or less" not in capsys.readouterr().err


def test_cuda_is_never_fallen_back_from(folders: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(TargetError, match="int4_b64, int8_row experts in a float32 graph"):
        OnnxSession.open(folders["onnx"], device="cuda")
    source = folders["source"]
    plan = hand_plan(Checkpoint(source), [["f32"] * 8] * 2, "onnx")
    whole = build(plan, tmp_path / "whole", model=source)
    if "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
        with pytest.raises(InputError, match="has no CUDAExecutionProvider"):
            OnnxSession.open(whole, device="cuda")
        plan.model_copy(update={"device": "cuda"}).save(whole / "plan.json")
        with pytest.raises(InputError, match="is to run on cuda, but .* or use --device cpu"):
            OnnxSession.open(whole)
        with OnnxSession.open(whole, device="cpu") as session:
            assert session.device.type == "cpu"

    class Fallen:
        def get_providers(self) -> list[str]:
            return ["CPUExecutionProvider"]

    with pytest.raises(InputError, match="runs m on CPUExecutionProvider"):
        onnx_library.require_provider(Fallen(), "cuda", "m")


@pytest.mark.parametrize(
    ("versions", "kind", "message"),
    [
        ({"onnxruntime": "1.32.0", "onnxruntime-gpu": "1.31.1"}, InputError, "overwrite each"),
        ({"onnxruntime": "1.30.0"}, InputError, "1.30.0 computes the experts of other models"),
    ],
)
def test_installations_that_do_not_work(
    versions: dict[str, str], kind: type, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(onnx_library, "_version", versions.get)
    with pytest.raises(kind, match=message):
        onnx_library.import_onnxruntime("running")


def test_a_missing_package_names_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "onnxruntime", None)
    monkeypatch.setattr(onnx_library, "_version", lambda _: None)
    with pytest.raises(MissingExtraError, match=r"edge-moe\[onnx\]"):
        onnx_library.import_onnxruntime("running")


def test_damaged_folders(folders: dict[str, Path], tmp_path: Path) -> None:
    folder = shutil.copytree(folders["onnx"], tmp_path / "damaged")
    graph = folder / "model.onnx"
    whole = graph.read_bytes()
    graph.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InputError, match=r"model\.onnx is truncated: \d+ bytes, \d+ bytes are"):
        OnnxSession.open(folder)
    graph.write_bytes(b"not a graph")
    write_checksums(folder, list(json.loads((folder / CHECKSUMS_NAME).read_text())["files"]))
    with pytest.raises(InputError, match="onnxruntime cannot load it"):
        OnnxSession.open(folder)
    shutil.copyfile(folders["onnx"] / CHECKSUMS_NAME, folder / CHECKSUMS_NAME)
    graph.write_bytes(whole)
    experts = folder / "experts-00001.data"
    packed = bytearray(experts.read_bytes())
    packed[1000] ^= 1
    experts.write_bytes(packed)
    with pytest.raises(InputError, match=r"experts-00001\.data is damaged: its CRC-32"):
        OnnxSession.open(folder)
    experts.unlink()
    with pytest.raises(InputError, match=r"experts-00001\.data is missing"):
        OnnxSession.open(folder)
    for text in ("{}", "[", '{"files": {}}'):
        (folder / CHECKSUMS_NAME).write_text(text)
        with pytest.raises(InputError, match=f"{CHECKSUMS_NAME}.*build"):
            OnnxSession.open(folder)
    (folder / CHECKSUMS_NAME).unlink()
    with pytest.raises(InputError, match=r"is missing \(removed, or .* older edge-moe\): build"):
        OnnxSession.open(folder)
    (folder / "plan.json").rename(folder / "other.json")
    with pytest.raises(InputError, match="no plan.json"):
        OnnxSession.open(folder)
    (folder / "other.json").rename(folder / "plan.json")
    (folder / "config.json").unlink()
    with pytest.raises(InputError, match=r"no config\.json, .*: copy it there again"):
        OnnxSession.open(folder)


def listed(folder: Path, **changes: dict[str, int] | None) -> None:
    """Change entries of the record; None removes one."""
    path = folder / CHECKSUMS_NAME
    content = json.loads(path.read_text())
    files = content["files"] | changes
    content["files"] = {name: record for name, record in files.items() if record is not None}
    path.write_text(json.dumps(content))


@pytest.mark.parametrize("name", ["../x", ".", "..", "", "a/b"])
def test_records_name_files_of_the_folder_only(
    name: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    folder = shutil.copytree(folders["onnx"], tmp_path / "out")
    listed(folder, **{name: {"num_bytes": 0, "crc32": 0}})
    with pytest.raises(InputError, match=rf"points outside the folder: '{re.escape(name)}': build"):
        require_whole(folder)


def test_every_graph_and_weight_must_be_there_and_listed(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    folder = shutil.copytree(folders["onnx"], tmp_path / "out")
    require_whole(folder)
    listed(folder, **{"extra.data": {"num_bytes": 0, "crc32": 0}})
    with pytest.raises(InputError, match=r"extra\.data is missing, 0 bytes are expected; build"):
        require_whole(folder)
    listed(folder, **{"extra.data": None, "experts-00001.data": None})
    with pytest.raises(InputError, match=r"does not list experts-00001\.data"):
        require_whole(folder)
    shutil.copyfile(folders["onnx"] / CHECKSUMS_NAME, folder / CHECKSUMS_NAME)
    shutil.copyfile(folder / "model.onnx", folder / "another.onnx")
    with pytest.raises(InputError, match=r"does not list another\.onnx"):
        require_whole(folder)


def test_a_folder_without_its_graph_is_still_known(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    folder = shutil.copytree(folders["onnx"], tmp_path / "damaged")
    (folder / "model.onnx").unlink()
    with pytest.raises(InputError, match=r"model\.onnx is missing"):
        open_model(folder, context_tokens=16)


def test_commands_that_need_the_source_say_so(
    folders: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["inspect", str(folders["onnx"])]) == 2
    assert "holds an ONNX decoder, which only run and eval read" in capsys.readouterr().err


def test_the_loop_on_the_command_line(
    tiny_checkpoint: TinyCheckpoint, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """calibrate, plan, build, run and eval with --target onnx; the plan's forms are its own."""
    source, stats = str(tiny_checkpoint("qwen3_moe")), str(tmp_path / "stats")
    plan, output = str(tmp_path / "plan.json"), str(tmp_path / "out")
    few = ["--max-windows", "2", "--window-tokens", "64"]
    assert run(["calibrate", source, "--task", "code", "--target", "onnx", "-o", stats, *few]) == 0
    command = ["plan", source, "--stats", stats, "--target", "onnx", "-o", plan, "--no-search"]
    assert run([*command, "--budget", "1GB"]) == 0
    whole = Plan.load(Path(plan))
    budget_bytes = whole.total_bytes - whole.term("experts").num_bytes * 7 // 8
    assert run([*command, "--budget", f"{budget_bytes}B"]) == 0
    forms = {form for row in Plan.load(Path(plan)).forms for form in row}
    assert forms <= {"drop", "int2_b64", "int4_b64", "int8_row", "f32"} and len(forms) > 1
    assert run(["build", plan, "-o", output, "--onnx-exact", "--onnx-standard"]) == 0
    assert "edge-moe run" in capsys.readouterr().err
    assert run(["run", output, "--prompt", "def", "--raw", "--max-new-tokens", "3"]) == 0
    assert run(["eval", output, "--against", source, "--task", "code", *few]) == 0
    assert "KLD" in capsys.readouterr().out


_FULL_CONTEXT = """
import json, sys
from pathlib import Path
import rich.console, typer
from edge_moe.runtime.memory import peak_memory_bytes
from edge_moe.runtime.onnx_session import OnnxSession

with OnnxSession.open(Path(sys.argv[1])) as session:
    session.generate_ids([1] * 300, session.context_tokens - 300, stop_at_eos=False)
    assert session.timing.cached_tokens >= session.context_tokens - 1
    print(json.dumps([peak_memory_bytes("cpu"), sum(term.num_bytes for term in session.memory())]))
"""


@needs_proc
@pytest.mark.slow
def test_a_full_context_stays_within_its_bill(
    tiny_checkpoint: TinyCheckpoint, tmp_path: Path
) -> None:
    """In a process of its own, as a user's: every page of the cache and the workspace touched."""
    source = Checkpoint(tiny_checkpoint("olmoe"))
    context_tokens = min(1024, source.spec.max_position_embeddings)
    tokenizer = tokenizer_bytes(source.location)
    terms = Setting(source, "onnx", "cpu", context_tokens, (tokenizer, "assumed")).bill(FORMS)
    update = {"terms": terms, "context_tokens": context_tokens}
    build(hand_plan(source, FORMS, "onnx").model_copy(update=update), tmp_path / "out")
    done = subprocess.run(
        [sys.executable, "-c", _FULL_CONTEXT, str(tmp_path / "out")],
        capture_output=True,
        text=True,
        check=True,
    )
    peak_bytes, planned_bytes = json.loads(done.stdout)
    assert 0.9 * planned_bytes < peak_bytes <= planned_bytes


def test_forms_or_a_target_but_not_both(
    tiny_checkpoint: TinyCheckpoint, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["calibrate", str(tiny_checkpoint("olmoe")), "--task", "code"]
    command += ["-o", str(tmp_path / "stats")]
    assert run([*command, "--target", "onnx", "--forms", "q8_0"]) == 2
    assert "give one of them" in capsys.readouterr().err
