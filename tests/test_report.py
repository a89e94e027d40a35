"""The report: rows worked out by hand, one offline file, and a picture from a real browser."""

from __future__ import annotations

import re
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from conftest import TinyCheckpoint
from hand_plan import hand_plan, uniform_forms
from rich.console import Console

from edge_moe.checkpoint import Checkpoint
from edge_moe.converters.build import build
from edge_moe.errors import InputError, PackageError
from edge_moe.formats import DROP, FORM_NAMES, form_bits
from edge_moe.measurement import EvalResult, Provenance, RunMeasurement
from edge_moe.metrics import Estimate
from edge_moe.plan import FrontierPoint, MemoryTerm, Plan, Rival, SearchRecord, SearchTrial, Target
from edge_moe.report import charts, print_report, write_report
from edge_moe.report.data import load_report
from edge_moe.report.facts import problem_table, record_command, speed_table, term_table

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")


def _terms() -> list[MemoryTerm]:
    return [
        MemoryTerm(name="dense weights", num_bytes=10_000_000, source="headers"),
        MemoryTerm(name="experts", num_bytes=2_500_000, source="plan"),
        MemoryTerm(name="KV cache", num_bytes=1_000_000, source="formula"),
        MemoryTerm(name="workspace", num_bytes=500_000, source="formula"),
        MemoryTerm(name="runtime", num_bytes=6_000_000, source="measured"),
    ]


def _plan() -> Plan:
    """2 layers x 4 experts of 1 MB at 16 bits: two dropped, four at 16 bits and so on."""
    forms = [["bf16", "drop", "q8_0", "drop"], ["q8_0", "q8_0", "drop", "drop"]]
    return Plan(
        edge_moe_version="0.1.0",
        model="some/<model>",
        model_type="qwen3_moe",
        model_fingerprint="a" * 64,
        stats_fingerprint="b" * 64,
        tasks=["code"],
        target="native",
        device="cpu",
        budget_bytes=21_000_000,
        context_tokens=1000,
        moe_layer_ids=[0, 1],
        top_k=2,
        forms=forms,
        tiers=[["none" if form == "drop" else "device" for form in row] for row in forms],
        terms=_terms(),
        loss=0.5,
        loss_unit="squared error of the MoE output",
        frontier=[
            FrontierPoint(total_bytes=19_500_000, expert_bytes=2_000_000, loss=0.9),
            FrontierPoint(total_bytes=25_500_000, expert_bytes=8_000_000, loss=0.01),
        ],
        rivals=[Rival(name="prune only", expert_bytes=2_000_000, loss=2.0, forms=forms)],
        saliency=[[0.7, 0.0, 0.3, 0.0], [0.5, 0.5, 0.0, 0.0]],
        routed_share=[[0.6, 0.1, 0.3, 0.0], [0.5, 0.4, 0.1, 0.0]],
        super_experts=[],
        form_bytes={"drop": 0, "q8_0": 500_000, "bf16": 1_000_000},
        limits=["nothing to say about </script>"],
        search=SearchRecord(
            chosen="default loss",
            is_complete=True,
            seconds=7.0,
            trials=[
                SearchTrial(name="<slow> trial", kld=0.3),
                SearchTrial(name="default loss", kld=0.1),
                SearchTrial(name="mixed bits, none dropped", kld=0.2),
            ],
            text="some text",
        ),
    )


def _measured(folder: Path) -> None:
    RunMeasurement(
        provenance=Provenance.here(),
        model=str(folder),
        model_kind="package",
        device="cpu",
        budget_bytes=21_000_000,
        context_tokens=1000,
        terms=_terms(),
        measured_terms={
            "dense weights": 10_500_000,
            "experts": 2_500_000,
            "KV cache": 550_000,
            "runtime": 5_940_000,
        },
        cached_tokens=500,
        peak_memory_bytes=20_400_000,
        prompt_tokens=5,
        generated_tokens=20,
        load_seconds=1.0,
        prefill_seconds=0.5,
        decode_seconds=2.0,
        tokens_per_second=10.0,
        paging={"hits": 7, "page_in_bytes": 1_000_000, "stall_seconds": 0.25},
    ).save(folder)


@pytest.fixture
def artefact(tmp_path: Path) -> Path:
    """A folder as `build` and `run --record` leave it, as far as the report looks."""
    folder = tmp_path / "out"
    _plan().save(folder / "plan.json")
    _measured(folder)
    return folder


def test_waterfall_adds_up(artefact: Path) -> None:
    steps = {step.label: step.num_bytes for step in load_report(artefact).waterfall()}
    assert steps["at 16 bits"] == 8_000_000
    assert steps["dropped"] == -4_000_000
    assert steps["fewer bits"] == -1_500_000
    assert steps["as stored"] == 2_500_000


def test_terms_carry_their_error(artefact: Path) -> None:
    rows = {row.name: row for row in load_report(artefact).term_rows()}
    assert rows["dense weights"].error == pytest.approx(0.05)
    assert rows["total"].error == pytest.approx(0.02)
    # 500 of 1000 tokens were cached: 10 % more than half of the 1 MB that was planned
    assert rows["KV cache"].measured_bytes == 550_000
    assert rows["KV cache"].error == pytest.approx(0.1)
    assert rows["KV cache"].how.endswith("500 of 1,000 tokens, compared with their share")
    assert rows["runtime"].error == pytest.approx(-0.01)
    rest = 20_400_000 - 10_500_000 - 2_500_000 - 550_000 - 5_940_000
    assert rows["workspace"].measured_bytes == rest
    assert rows["workspace"].how.startswith("derived")
    assert sum(row.measured_bytes or 0 for row in rows.values()) == 2 * 20_400_000


def test_a_workspace_lost_in_the_runtime_is_not_invented(artefact: Path) -> None:
    data = load_report(artefact)
    assert data.run is not None
    run = data.run.model_copy(update={"peak_memory_bytes": 15_000_000})
    (row,) = [r for r in replace(data, run=run).term_rows() if r.name == "workspace"]
    assert row.measured_bytes is None and row.error is None
    known = {"dense weights": 10_500_000}
    run = data.run.model_copy(update={"measured_terms": known})  # an assumed runtime
    (row,) = [r for r in replace(data, run=run).term_rows() if r.name == "workspace"]
    assert row.measured_bytes is None and row.how == ""


def test_context_rows_scale_the_kv_cache_only(artefact: Path) -> None:
    rows = {tokens: (kv, total) for tokens, kv, total in load_report(artefact).context_rows()}
    assert rows[512] == (512_000, 20_000_000 - 1_000_000 + 512_000)


def test_terminal_report_says_what_matters(artefact: Path) -> None:
    console = Console(width=100, record=True, file=open("/dev/null", "w"))
    print_report(artefact, console)
    text = console.export_text()
    assert "Fits: 20.4 MB measured of 21.0 MB" in text
    assert "+2.0%" in text
    assert "4 drop, 3 q8_0, 1 bf16" in text
    assert "3 plans measured in 7 s" in text
    assert re.search(r"default loss +0\.1 +this plan", text)
    assert len(text.splitlines()) <= 40


def test_folder_without_plan_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"holds no plan\.json.*edge-moe build"):
        load_report(tmp_path)
    with pytest.raises(InputError, match="is not a folder"):
        load_report(tmp_path / "missing")


def test_page_is_offline_and_escapes(artefact: Path, tmp_path: Path) -> None:
    pytest.importorskip("plotly")
    output = tmp_path / "report.html"
    write_report(artefact, output)
    page = output.read_text(encoding="utf-8")
    body = page[page.index("</head>") :]
    assert not re.search(r'(src|href)="https?://', body)
    assert "some/&lt;model&gt;" in body
    assert body.count("</script>") == body.count("<script")
    for name in ("bill", "waterfall", "frontier", "search", "forms", "saliency"):
        assert f'id="chart-{name}"' in body
    assert "&lt;slow&gt; trial" in body and "3 plans measured in 7 s on some text" in body


def test_a_gguf_file_is_not_to_be_measured_by_run(tmp_path: Path) -> None:
    pytest.importorskip("plotly")
    _plan().save(tmp_path / "plan.json")
    for target, says_how in (("native", True), ("gguf", False)):
        if target == "gguf":
            (tmp_path / "model.gguf").touch()
        console = Console(width=100, record=True, file=open("/dev/null", "w"))
        print_report(tmp_path, console)
        write_report(tmp_path, tmp_path / "report.html")
        page = (tmp_path / "report.html").read_text(encoding="utf-8")
        assert ("memory not measured yet: edge-moe run" in console.export_text()) == says_how
        assert ("Nothing is measured yet: <code>edge-moe run" in page) == says_how


@pytest.mark.parametrize("target", ["native", "onnx"])
def test_the_command_to_measure_is_one_that_run_takes(target: Target, tmp_path: Path) -> None:
    _plan().model_copy(update={"target": target}).save(tmp_path / "plan.json")
    command = record_command(load_report(tmp_path))
    assert command.startswith("edge-moe run")
    assert " --budget 21000000B --ctx 1000 --prompt" in command


def test_one_measured_plan_is_no_chart(artefact: Path, tmp_path: Path) -> None:
    pytest.importorskip("plotly")
    plan = Plan.load(artefact / "plan.json")
    assert plan.search is not None
    plan.search.trials = plan.search.trials[1:2]
    plan.save(artefact / "plan.json")
    write_report(artefact, tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "chart-search" not in page and "red mark" not in page
    assert "1 plan measured in 7 s" in page


def test_a_search_that_measured_nothing_says_why(artefact: Path) -> None:
    plan = Plan.load(artefact / "plan.json")
    assert plan.search is not None
    plan.search.trials, plan.search.is_complete = [], False
    plan.search.failure = "/data: No space left"
    plan.save(artefact / "plan.json")
    console = Console(width=100, record=True, file=open("/dev/null", "w"))
    print_report(artefact, console)
    text = " ".join(console.export_text().split())
    assert "0 plans measured in 7 s" in text
    assert "no more could be measured: /data: No space left" in text
    assert "proposed by" not in text


def test_problems_solved_are_shown(artefact: Path, tmp_path: Path) -> None:
    pytest.importorskip("plotly")
    _evaluated(artefact, "prose")
    assert problem_table(load_report(artefact)) == []
    solved = {"num_problems": 20, "exact_match": Estimate(0.9, 0.068)}
    _evaluated(artefact, "arithmetic", **solved)
    (row,) = problem_table(load_report(artefact))
    assert row == {
        "task": "arithmetic (off task)",
        "problems": "20",
        "before": "-",
        "after": "90.0 ± 6.8 %",
        "recovery": "-",
    }
    base = {"base_exact_match": Estimate(1.0, 0.024), "recovery_of": "exact match"}
    kept = {"recovery_percent": 90.0, "recovery_error_percent": 7.1}
    _evaluated(artefact, "arithmetic", **solved, **base, **kept)
    write_report(artefact, tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    console = Console(width=100, record=True, file=open("/dev/null", "w"))
    print_report(artefact, console)
    for text in ("100.0 ± 2.4 %", "90.0 ± 6.8 %", "90.0 ± 7.1 %"):
        assert f"<td>{text}</td>" in page
        assert text in console.export_text(clear=False)


def _evaluated(folder: Path, task: str, **quality: Any) -> None:
    EvalResult(
        provenance=Provenance.here(),
        model=str(folder),
        model_kind="package",
        against=None,
        task=task,
        in_task=False,
        window_tokens=256,
        num_windows=1,
        num_tokens=255,
        perplexity=Estimate(3.0, 0.1),
        seconds=1.0,
        **quality,
    ).save(folder)


@pytest.mark.parametrize("loss", ["experts-00001.safetensors", "edge_moe.json", "gutted"])
def test_a_package_that_lost_something_is_refused(
    loss: str, tiny_checkpoint: TinyCheckpoint, tmp_path: Path
) -> None:
    checkpoint = Checkpoint(tiny_checkpoint("qwen3_moe"))
    folder = build(hand_plan(checkpoint, uniform_forms(checkpoint, 4), "native"), tmp_path / "out")
    load_report(folder)
    if loss == "gutted":
        (folder / "edge_moe.json").write_text('{"version": 1}')
    else:
        (folder / loss).unlink()
    with pytest.raises(PackageError, match="build"):
        load_report(folder)


def test_paging_is_shown_only_where_something_was_paged(artefact: Path) -> None:
    data = load_report(artefact)
    assert data.run is not None
    assert "hits" not in {row["name"] for row in speed_table(data)}
    run = data.run.model_copy(update={"paging": data.run.paging | {"misses": 2.0}})
    assert "hits" in {row["name"] for row in speed_table(replace(data, run=run))}


def test_charts_say_what_the_table_says(artefact: Path) -> None:
    pytest.importorskip("plotly")
    data = load_report(artefact)
    names = {trace.name for trace in charts.memory_bill(data).data}
    for row in term_table(data):
        assert row["is_total"] or f"{row['name']} {row['planned']}" in names


def test_a_frontier_without_loss_leaves_the_log_axis(artefact: Path) -> None:
    pytest.importorskip("plotly")
    data = load_report(artefact)
    exact = FrontierPoint(total_bytes=27_500_000, expert_bytes=10_000_000, loss=0.0)
    data.plan.frontier.append(exact)
    figure = charts.frontier(data)
    assert list(figure.data[0].y) == [0.9, 0.01]
    assert [note.text for note in figure.layout.annotations] == ["no loss from 10.0 MB on"]


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed")
def test_page_draws_in_a_browser(artefact: Path, tmp_path: Path) -> None:
    pytest.importorskip("plotly")
    output = tmp_path / "report.html"
    write_report(artefact, output)
    dom = _browse(output, tmp_path, "--dump-dom", "--virtual-time-budget=20000")
    assert dom.count('class="main-svg"') >= 6
    picture = tmp_path / "report.png"
    _browse(
        output,
        tmp_path,
        f"--screenshot={picture}",
        "--window-size=1100,3600",
        "--virtual-time-budget=20000",
    )
    assert picture.stat().st_size > 50_000


def _browse(page: Path, profile: Path, *options: str) -> str:
    assert CHROMIUM is not None
    flags = (
        "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run "
        "--disable-background-networking --disable-component-update --disable-sync"
    )
    command = [CHROMIUM, *flags.split(), f"--user-data-dir={profile / 'browser'}", *options]
    done = subprocess.run(
        [*command, page.as_uri()], capture_output=True, text=True, timeout=180, check=True
    )
    return done.stdout


def test_every_form_has_a_colour() -> None:
    assert set(FORM_NAMES) <= set(charts.FORM_COLOURS)
    assert len(set(charts.FORM_COLOURS.values())) == len(charts.FORM_COLOURS)
    kept = [form for form in charts.FORM_COLOURS if form != DROP]
    by_bits = sorted(kept, key=form_bits)  # stable: some have as many
    shades = [sum(bytes.fromhex(charts.FORM_COLOURS[form][1:])) for form in by_bits]
    assert shades == sorted(shades, reverse=True)
