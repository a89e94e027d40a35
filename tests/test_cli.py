"""Bad input ends in one line that names the thing, the value and the remedy; never a traceback."""

from __future__ import annotations

import errno
import inspect
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from conftest import TinyCheckpoint
from hand_plan import hand_plan, uniform_forms

import edge_moe
from edge_moe.checkpoint import Checkpoint
from edge_moe.cli import explain, run
from edge_moe.converters.build import build
from edge_moe.errors import BudgetError, InputError
from edge_moe.files import atomic_path, require_free_disk
from edge_moe.inspect import inspect_model
from edge_moe.moments import LayerMoments, moments_path
from edge_moe.reproduce import RAW_HINT
from edge_moe.start import BLAS_WAIT
from edge_moe.stats import EXPERT_SUMS, STATS_VERSION, ExpertStats, StatsInfo

Failure = Callable[..., str]


@pytest.fixture
def fails(capsys: pytest.CaptureFixture[str]) -> Failure:
    """`fails("inspect", "x")`: the single line on stderr, without `error: `; exit code 2."""

    def call(*arguments: str | Path, code: int = 2) -> str:
        capsys.readouterr()  # progress bars of the fixtures
        assert run([str(argument) for argument in arguments]) == code
        output = capsys.readouterr()
        lines = output.err.splitlines()
        assert len(lines) == 1, output.err
        assert lines[0].startswith("error: ")
        return lines[0].removeprefix("error: ")

    return call


@pytest.fixture
def checkpoint(tiny_checkpoint: TinyCheckpoint, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(tiny_checkpoint("qwen3_moe"), tmp_path / "model"))


def stats_info(windows: tuple[int, ...] = (0,)) -> StatsInfo:
    return StatsInfo(
        version=STATS_VERSION,
        edge_moe_version=edge_moe.__version__,
        model_type="qwen3_moe",
        model_fingerprint="m",
        tokenizer_fingerprint="t",
        data_fingerprint="d",
        tasks=("code",),
        window_tokens=4,
        num_windows=2,
        windows=windows,
        num_tokens=4,
        moe_layer_ids=(0, 2),
        num_experts=4,
        top_k=2,
        forms=("drop", "q8_0"),
    )


def save_stats(folder: Path, window: int) -> Path:
    stats = ExpertStats.zeros(stats_info((window,)))
    stats.routed_tokens[:] = [[6, 2, 0, 0], [2, 2, 2, 2]]
    for name in EXPERT_SUMS:
        stats.expert_sums[name].add(np.full((2, 4), 0.5))
    stats.layer_sums["moe_square"].add(np.array([4.0, 8.0]))
    stats.form_loss.add(np.full((2, 4, 2), [1.0, 0.25]))
    for layer_id in stats.info.moe_layer_ids:
        LayerMoments.zeros(4, 8, 6).save(moments_path(folder, layer_id))
    stats.save(folder)
    return folder


def test_version_and_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["--version"]) == 0
    assert capsys.readouterr().out == f"edge-moe {edge_moe.__version__}\n"
    assert run(["--help"]) == 0
    assert "calibrate" in capsys.readouterr().out


@pytest.mark.parametrize(
    "command",
    [
        "inspect",
        "calibrate",
        "plan",
        "build",
        "run",
        "eval",
        "report",
        "demo",
        "calibrate-skipping",
        "patterns",
        "simulate",
        "trace",
        "stats merge",
        "stats show",
    ],
)
def test_every_command_has_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run([*command.split(), "--help"]) == 0
    assert "Usage: edge-moe" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["frob"], "No such command 'frob': see `edge-moe --help`"),
        (["inspect"], "Missing argument 'MODEL': see `edge-moe inspect --help`"),
        (["inspect", "x", "--frob"], "No such option: --frob"),
        (["stats"], "Missing command: see `edge-moe stats --help`"),
        (["plan", "x", "--stats", "s", "--budget", "12 parsecs"], "'12 parsecs' is not understood"),
        (["plan", "x", "--stats", "s", "--budget", "1GB", "--ctx", "long"], "'long'"),
        (["plan", "x", "--stats", "s", "--budget", "1GB", "--target", "tape"], "'tape'"),
        (["run", "x", "--budget", "some"], "'some' is not understood"),
        (["run", "x", "--prompt", ""], "--prompt is empty: give it some text"),
        (["run", "x", "--prompt", "\n "], "--prompt is empty: give it some text"),
        (["calibrate", "x", "--task", "code", "--shard", "4/4"], "shard '4/4'"),
        (["calibrate", "x", "--task", "code", "--forms", ","], "','"),
        (["build", "nowhere.json", "-o", "out"], "nowhere.json does not exist"),
        (["stats", "show", "nowhere"], "nowhere holds no finished statistics"),
        (["recover", "x", *"--against x --task t -o o --seed -1".split()], "'--seed': Input"),
        (["upcycle", "x", "-o", "o", "--seed", "-1"], "should be greater than or equal to 0"),
        (["upcycle", "x", "-o", "o", "--seed", str(2**32)], "less than or equal to 4294967295"),
        (["simulate", "x", "y", "--seed", "-1"], "'--seed': Input should be greater than"),
        (["fit-pre-gate", "x", *"--task t -o o --seed -1".split()], "'--seed': Input should be"),
        (["inspect", "nowhere"], "'nowhere' does not exist: give a checkpoint folder"),
    ],
)
def test_bad_usage(arguments: list[str], message: str, fails: Failure) -> None:
    assert message in fails(*arguments)


def test_unknown_architecture(checkpoint: Path, fails: Failure) -> None:
    (checkpoint / "config.json").write_text(json.dumps({"model_type": "abacus"}))
    message = fails("inspect", checkpoint)
    assert "'abacus' is not supported" in message and "qwen3_moe" in message


def test_truncated_weights(checkpoint: Path, fails: Failure) -> None:
    weights = checkpoint / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])
    assert "is truncated" in fails("inspect", checkpoint)


def test_wrong_shapes(checkpoint: Path, fails: Failure) -> None:
    path = checkpoint / "config.json"
    path.write_text(
        path.read_text().replace('"moe_intermediate_size": 64', '"moe_intermediate_size": 32')
    )
    assert "config.json implies" in fails("inspect", checkpoint)


def test_empty_task_text(checkpoint: Path, tmp_path: Path, fails: Failure) -> None:
    task = tmp_path / "empty.jsonl"
    task.write_text("\n\n")
    message = fails("calibrate", checkpoint, "--task", task, "-o", tmp_path / "stats")
    assert f"{task} holds no text" in message
    assert not (tmp_path / "stats").exists()
    task.write_text('{"text": "word"}\n')
    message = fails("calibrate", checkpoint, "--task", task, "-o", tmp_path / "stats")
    assert f"{task} is too short to hold out a fifth" in message


def test_stats_merge_and_show(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    parts = [str(save_stats(tmp_path / f"part{window}", window)) for window in (0, 1)]
    assert run(["stats", "merge", str(tmp_path / "all"), *parts]) == 0
    capsys.readouterr()
    assert run(["stats", "show", str(tmp_path / "all"), "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["info"]["windows"] == [0, 1]
    first, second = shown["layers"]
    assert (first["unseen_experts"], first["experts_for_half"]) == (2, 1)
    assert (second["unseen_experts"], second["experts_for_half"]) == (0, 2)
    assert (first["busiest_expert_id"], first["busiest_share"]) == (0, 0.75)
    assert first["form_loss"] == {"drop": 1.0, "q8_0": 0.25}
    assert run(["stats", "show", str(tmp_path / "all")]) == 0
    assert "qwen3_moe on code" in capsys.readouterr().out


def test_stats_merge_refuses(tmp_path: Path, fails: Failure) -> None:
    part = save_stats(tmp_path / "part", 0)
    output = tmp_path / "all"
    assert "window 0 is in both" in fails("stats", "merge", output, part, part)
    assert "only" in fails("stats", "merge", output, part)
    assert not output.exists()
    assert f"output {part} already exists" in fails("stats", "merge", part, part, part)


def test_explain_covers_what_users_meet() -> None:
    assert explain(InputError("a\n b")) == ("a b", 2)
    assert explain(BudgetError("too small: 3 GB is the smallest", 3))[1] == 3
    full = OSError(errno.ENOSPC, "No space left on device", "/out/x")
    assert explain(full) == (
        "/out/x: No space left on device; free some space and start again",
        2,
    )
    rust = Exception("I/O error: No space left on device (os error 28)")
    assert explain(rust) == ("No space left on device; free some space and start again", 2)
    denied = PermissionError(errno.EACCES, "Permission denied", "/root/x")
    assert explain(denied) == ("/root/x: Permission denied; change its permissions", 2)
    missing = ModuleNotFoundError("No module named 'plotly'", name="plotly.graph_objects")
    assert "pip install 'edge-moe[report]'" in explain(missing)[0]
    assert "in a checkout pip install -e '.[report]'" in explain(missing)[0]
    message, code = explain(ZeroDivisionError("division by zero"))
    assert code == 1 and "internal error, ZeroDivisionError" in message


def test_debug_shows_where(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("EDGE_MOE_DEBUG", "1")
    assert run(["inspect", "nowhere"]) == 2
    assert "Traceback" in capsys.readouterr().err


def test_module_starts_with_passive_threads(demo_model: Path) -> None:
    code = (
        "import os, sys; sys.argv = ['edge-moe', '--version']; from edge_moe.cli import main\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        "print(os.environ['OMP_WAIT_POLICY'], os.environ.get('GOMP_SPINCOUNT'))\n"
        "from edge_moe.runtime.llama_api import calm_threads; calm_threads()\n"
        "print(os.environ['OMP_WAIT_POLICY'], os.environ.get('GOMP_SPINCOUNT'))"
    )
    unset = {name: value for name, value in os.environ.items() if "OMP_" not in name}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=unset
    )
    assert done.stdout.splitlines()[-2:] == ["PASSIVE None", "PASSIVE 3000"]


def defaults(function: Callable[..., object]) -> dict[str, object]:
    parameters = inspect.signature(function).parameters.values()
    return {each.name: each.default for each in parameters if each.default is not each.empty}


def test_flags_repeat_the_defaults_of_the_functions() -> None:
    from edge_moe.commands.calibrate import calibrate_command
    from edge_moe.commands.evaluate import eval_command
    from edge_moe.converters.calibrate import calibrate
    from edge_moe.runtime.evaluate import evaluate

    for command, function in ((calibrate_command, calibrate), (eval_command, evaluate)):
        flags, wanted = defaults(command), defaults(function)
        for name in flags.keys() & wanted.keys() - {"shard"}:
            assert flags[name] == wanted[name], name


def test_a_reader_that_stops_early_is_no_error(demo_model: Path) -> None:
    code = "from edge_moe.start import main; main()"
    for flags in ([], ["--json"]):
        reading, writing = os.pipe()
        os.close(reading)
        command = [sys.executable, "-c", code, "inspect", str(demo_model), *flags]
        done = subprocess.run(command, stdout=writing, stderr=subprocess.PIPE, check=False)
        os.close(writing)
        assert (done.returncode, done.stderr) == (141, b"")


def test_ctrl_c_while_importing_ends_quietly() -> None:
    code = (
        "import builtins, sys; real = builtins.__import__\n"
        "def stop(name, *rest):\n"
        "    if name == 'typer': raise KeyboardInterrupt\n"
        "    return real(name, *rest)\n"
        "builtins.__import__ = stop\n"
        "from edge_moe.start import main; main()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=False)
    assert (done.returncode, done.stderr) == (130, b"")


@pytest.mark.parametrize(("given", "used"), [(None, "4"), ("20", "20")])
def test_idle_blas_threads_sleep_at_once_unless_told(given: str | None, used: str) -> None:
    code = (
        "import atexit, os, sys; sys.argv = ['edge-moe', '--version']\n"
        "atexit.register(lambda: print(os.environ['OPENBLAS_THREAD_TIMEOUT']))\n"
        "from edge_moe.start import main; main()"
    )
    rest = {name: value for name, value in os.environ.items() if name != BLAS_WAIT}
    environment = rest | ({BLAS_WAIT: given} if given else {})
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment
    )
    assert done.stdout.split()[-1] == used


def test_numpy_is_not_imported_before_the_command_line() -> None:
    code = "import sys, edge_moe.start; sys.exit('numpy' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_values_that_mean_nothing_name_their_flag(
    fails: Failure, checkpoint: Path, tmp_path: Path
) -> None:
    run_it = ("run", checkpoint, "--prompt", "x")
    for value in ("nan", "inf", "-1"):
        assert f"--temperature is {value}: use 0" in fails(*run_it, "--temperature", value)
    assert "--top-p is nan: use" in fails(*run_it, "--top-p", "nan")
    assert "--seed is -1: use 0 to" in fails(*run_it, "--seed", "-1")
    abc = fails(*run_it, "--max-new-tokens", "abc")
    assert "'--max-new-tokens': not a valid integer: see" in abc
    evaluate = ("eval", checkpoint, "--task", "code")
    assert "--max-problems is -2: use 0 or more" in fails(*evaluate, "--max-problems", "-2")
    calibrate = ("calibrate", checkpoint, "--task", "code", "-o", tmp_path / "out")
    assert "--max-windows is 0: use at least 1" in fails(*calibrate, "--max-windows", "0")
    assert not (tmp_path / "out").exists()


def test_a_file_where_a_folder_belongs_and_the_other_way_round(
    fails: Failure, checkpoint: Path, tmp_path: Path
) -> None:
    file, folder = tmp_path / "garbage", tmp_path / "empty"
    file.write_text("x")
    folder.mkdir()
    assert "is a file: MODEL must be a checkpoint folder" in fails("inspect", file)
    plan = fails("plan", checkpoint, "--stats", "nowhere", "--budget", "1GB", "-o", folder)
    assert plan == f"output {folder} is a folder: name a file, such as {folder / 'out.json'}"
    assert f"output {folder} is a folder" in fails("report", checkpoint, "-o", folder)
    empty = fails("run", folder, "--prompt", "x")
    assert empty.startswith(f"{folder / 'config.json'} does not exist: give a folder with config")
    nowhere = tmp_path / "none" / "a.safetensors"
    text = ("--task", "code", "-o")
    for command in (
        ("trace", checkpoint, *text, nowhere),
        ("fit-guesses", checkpoint, *text, nowhere),
        ("run", checkpoint, "--prompt", "x", "--trace", nowhere),
    ):
        assert f"output {nowhere}: there is no folder {nowhere.parent}" in fails(*command)
    for name in ("trace", "fit-guesses"):
        wrong = fails(name, checkpoint, *text, tmp_path / "a.json")
        assert wrong.endswith(f"name it so, such as {tmp_path / 'a.safetensors'}")


def test_a_model_that_moved_is_given_by_a_flag(
    fails: Failure, checkpoint: Path, tmp_path: Path
) -> None:
    opened = Checkpoint(checkpoint)
    hand_plan(opened, uniform_forms(opened, 4)).save(tmp_path / "plan.json")
    checkpoint.rename(tmp_path / "moved")
    message = fails("build", tmp_path / "plan.json", "-o", tmp_path / "out")
    assert message.endswith(f"is not at {checkpoint} any more: say where with --model")


def test_errors_of_the_system_name_the_output_not_its_temporary_file(tmp_path: Path) -> None:
    with pytest.raises(IsADirectoryError) as caught, atomic_path(tmp_path) as temporary:
        temporary.write_text("x")
    assert caught.value.filename == str(tmp_path)
    for full in (OSError(errno.ENOSPC, "full"), Exception("I/O error: full (os error 28)")):
        with pytest.raises(OSError, match=r"out\.json") as caught_full:
            with atomic_path(tmp_path / "out.json") as temporary:
                raise full
        message, code = explain(caught_full.value)
        assert message == f"{tmp_path / 'out.json'}: No space left on device; " + (
            "free some space and start again"
        )
        assert code == 2
    foreign = PermissionError(errno.EACCES, "Permission denied", "/elsewhere")
    with pytest.raises(PermissionError) as kept, atomic_path(tmp_path / "out.json"):
        raise foreign
    assert kept.value is foreign
    assert not list(tmp_path.glob(".*"))


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs /proc")
def test_a_place_that_stores_no_files() -> None:
    with pytest.raises(InputError, match="/proc stores no files; choose another folder"):
        require_free_disk(Path("/proc/foo"), 1, "a test")


def test_a_package_lists_no_export_targets(checkpoint: Path, tmp_path: Path) -> None:
    opened = Checkpoint(checkpoint)
    package = build(hand_plan(opened, uniform_forms(opened, 4)), tmp_path / "out")
    assert inspect_model(str(package)).targets == []


def test_a_finished_build_says_how_to_run_it(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    opened = Checkpoint(checkpoint)
    plan = hand_plan(opened, uniform_forms(opened, 4), "native")
    for task, options in (("code", "--prompt ... --raw"), ("gone.jsonl", "--prompt ...")):
        plan.model_copy(update={"tasks": [task]}).save(tmp_path / "plan.json")
        output, model = tmp_path / task, ("--model", str(checkpoint))
        assert run(["build", str(tmp_path / "plan.json"), "-o", str(output), *model]) == 0
        words = f"next: edge-moe run {output} {options} ({RAW_HINT})".split()
        assert "".join(capsys.readouterr().err.split()).endswith("".join(words))  # wrapped anywhere


def test_the_folder_of_a_gguf_build_points_to_its_file(fails: Failure, tmp_path: Path) -> None:
    file = tmp_path / "model.gguf"
    file.touch()
    (tmp_path / "plan.json").touch()
    for command in (("inspect",), ("eval", "--task", "code"), ("calibrate", "--task", "code")):
        assert f"build, eval and run read {file} itself" in fails(*command, tmp_path)
    for model in (tmp_path, file):
        assert str(file) in fails("run", model, "--prompt", "x"), "which is empty"


def test_of_several_gguf_files_none_is_guessed(fails: Failure, tmp_path: Path) -> None:
    for name in ("b.gguf", "a.gguf", "big-00001-of-00002.gguf", "big-00002-of-00002.gguf"):
        (tmp_path / name).touch()
    wanted = "several GGUF models, a.gguf, b.gguf, big-00001-of-00002.gguf: give one of these files"
    for command in (("inspect",), ("run", "--prompt", "x")):
        assert wanted in fails(command[0], tmp_path, *command[1:])
    for name in ("a.gguf", "b.gguf"):
        (tmp_path / name).unlink()
    assert "big-00001-of-00002.gguf itself" in fails("inspect", tmp_path)


def test_build_of_a_model_says_how_to_make_a_plan(fails: Failure, tmp_path: Path) -> None:
    file = tmp_path / "model.gguf"
    file.touch()
    for model in (file, tmp_path):
        message = fails("build", model, "-o", tmp_path / "out")
        assert f"{model} is no plan but a model: first `edge-moe calibrate {model}" in message
        assert message.endswith("-o plan.json`, and give plan.json")


@pytest.mark.parametrize(
    "command",
    [
        ("calibrate-skipping", "--task", "code"),
        ("patterns", "--stats", "code=stats"),
        ("transform", "--task", "code", "--method", "prune", "--experts", "4"),
        ("compare", "--task", "code"),
    ],
)
def test_commands_that_need_the_checkpoint_say_so_of_a_gguf_file(
    command: tuple[str, ...], fails: Failure, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "model.gguf"
    file.touch()
    name, *options = command
    message = fails(name, file, *options, "-o", tmp_path / "out")
    assert (
        f"{file} is a GGUF file, which only inspect, calibrate, plan, build, eval and run read"
        in message
    )
    assert message.endswith("give the Hugging Face folder that it was made from")
    assert not (tmp_path / "out").exists()
    assert run([name, "--help"]) == 0
    assert ".gguf" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("work", "command"),
    [
        ("calibrate.calibrate", ("calibrate", "MODEL", "--task", "code")),
        (
            "calibrate_skipping.calibrate_skipping",
            ("calibrate-skipping", "MODEL", "--task", "code"),
        ),
        (
            "transform.transform",
            ("transform", "MODEL", "--task", "code", "--method", "prune", "--experts", "4"),
        ),
        ("compare.compare", ("compare", "MODEL", "--task", "code")),
        ("recover.recover", ("recover", "package", "--against", "MODEL", "--task", "code")),
        ("build.build", ("build", "PLAN", "--model", "MODEL")),
    ],
)
def test_stopped_work_that_resumes_says_how(
    work: str,
    command: tuple[str, ...],
    demo_model: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(f"edge_moe.converters.{work}", stop)
    opened = Checkpoint(demo_model)
    hand_plan(opened, uniform_forms(opened, 4)).save(tmp_path / "plan.json")
    paths = {"MODEL": str(demo_model), "PLAN": str(tmp_path / "plan.json")}
    words = [paths.get(word, word) for word in command]
    assert run([*words, "-o", str(tmp_path / "out")]) == 130
    assert "run the same command again to resume" in capsys.readouterr().err
