"""The report: tables and files that say the same, and the HTML page in a real browser."""

from __future__ import annotations

import csv
import io
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from trivium.backends.tensorrt import cost as tensorrt_cost
from trivium.backends.xla import cost as xla_cost
from trivium.compiler import prepare, report, targets
from trivium.compiler.compare import Comparison, compare
from trivium.compiler.plan import Constraints, choose
from trivium.compiler.report import units
from trivium.compiler.types import Candidate, Workload

UNKNOWN = "\N{EN DASH}"
HOSTILE = "</script><script>window.hacked = 1</script><!--<script>"


@pytest.fixture(scope="module")
def result(shared_data: Callable[[str], Path]) -> Comparison:
    """A real model on the host (measured), on GPUs and TPUs (predicted), and refused on FPGAs."""
    path = shared_data("models/mlperf_ic_resnet8_fp32.onnx")
    measured = compare(path, ["cpu"], shape=["N=1"], measure=True)
    model, _ = prepare.optimize(path, shape=["N=1"])
    candidates = list(measured.candidates)
    for name in targets.names():
        target = targets.find(name)
        if target.family == "fpga":
            refusals = (f"node {HOSTILE} (Softmax): not quantized", "another")
            candidates.append(Candidate(target, "fpga", "none", None, refusals))
        for module in (xla_cost, tensorrt_cost):
            if target.family == "gpu" or (target.family == "tpu" and module is xla_cost):
                estimate = module.estimate(model, target, Workload())
                backend = module.__name__.split(".")[-2]
                candidates.append(Candidate(target, backend, "none", estimate))
    return Comparison(path.name, Workload(dims={"N": 1}), tuple(candidates))


def test_json_is_the_comparison(result: Comparison) -> None:
    assert json.loads(report.to_json(result)) == json.loads(json.dumps(result.to_json()))


def test_csv_has_a_line_for_each_candidate_and_empty_unknowns(result: Comparison) -> None:
    lines = list(csv.DictReader(io.StringIO(report.to_csv(result))))
    assert len(lines) == len(result.rows)
    for line, row in zip(lines, result.rows, strict=True):
        assert line["target"] == row["target"]
        assert line["latency_s"] == ("" if row["latency_s"] is None else str(row["latency_s"]))
        assert line["refusals"] == "; ".join(row["refusals"])


def printed(result: Any, width: int) -> str:
    stream = io.StringIO()
    report.terminal(result, console=Console(file=stream, width=width))
    return stream.getvalue()


def test_the_terminal_shows_every_candidate_and_why_others_are_refused(result: Comparison) -> None:
    text = printed(result, 200)
    for row in result.rows:
        assert row["target"] in text
    assert "(and 1 more)" in text
    assert "80% interval" in text


def test_the_terminal_says_why_a_latency_is_unknown(shared_data: Callable[[str], Path]) -> None:
    path = shared_data("models/mlperf_ic_resnet8_fp32.onnx")
    made = compare(path, ["nvidia-jetson-agx-orin-64"], shape=["N=1"])
    assert made.rows[0]["latency_s"] is None
    assert "no published memory bandwidth of nvidia-jetson-agx-orin-64" in printed(made, 200)


def test_a_narrow_terminal_leaves_columns_out_instead_of_cutting_them(result: Comparison) -> None:
    text = printed(result, 80)
    table = text.split("\n\n")[0]
    assert "…" not in table
    assert "80% interval" not in table
    assert max(len(line) for line in table.splitlines()) <= 80


def test_a_plan_prints_its_verdicts(result: Comparison) -> None:
    chosen = choose(result.candidates, Constraints(), "latency")
    assert "times that of" in printed(chosen, 200)
    assert json.loads(report.to_json(chosen))["best"]["verdict"] == "best"


@pytest.mark.parametrize(
    ("value", "shown"),
    [(1.234e-6, "1.23 µs"), (0.5, "500 ms"), (12.0, "12.0 s"), (0.0, "0 s"), (None, units.UNKNOWN)],
)
def test_seconds_read_well(value: float | None, shown: str) -> None:
    assert units.seconds(value) == shown


def test_the_page_carries_its_data_and_refers_to_nothing(result: Comparison) -> None:
    page = report.to_html(result)
    start = page.index(">", page.index('id="data"')) + 1
    data = page[start : page.index("</script>", start)]
    assert json.loads(data) == json.loads(json.dumps(report.document(result)))
    assert HOSTILE not in page
    for reference in ("src=", "@import", "url(http", "fetch(", "XMLHttpRequest"):
        assert reference not in page.replace(data, "")


# --- in a browser --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if chromium is None or driver is None:
        pytest.skip("no chromium and chromedriver (apt-get install chromium chromium-driver)")
    selenium = pytest.importorskip("selenium.webdriver")
    options = selenium.ChromeOptions()
    options.binary_location = chromium
    for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    from selenium.webdriver.chrome.service import Service

    opened = selenium.Chrome(options=options, service=Service(driver))
    opened.set_window_size(1200, 1400)
    yield opened
    opened.quit()


@pytest.fixture(scope="module")
def page(browser: Any, result: Comparison, tmp_path_factory: pytest.TempPathFactory) -> Any:
    file = tmp_path_factory.mktemp("page") / "report.html"
    file.write_text(report.to_html(result), encoding="utf-8")
    browser.get(file.as_uri())
    return browser


def find(page: Any, selector: str) -> list[Any]:
    return list(page.find_elements("css selector", selector))


def click(page: Any, selector: str) -> None:
    element = find(page, selector)[0]
    page.execute_script("arguments[0].scrollIntoView({block: 'center'})", element)
    element.click()


@pytest.mark.slow
def test_the_page_draws_a_bar_for_each_known_latency(page: Any, result: Comparison) -> None:
    known = [r for r in result.rows if r["feasible"] and r["latency_s"] is not None]
    assert len(find(page, "#chart svg g")) == len(known)
    assert len(find(page, "#chart svg path.measured")) == 1
    assert len(find(page, "tr.candidate")) == len(result.rows)
    assert len(find(page, "#refused dt")) == len([r for r in result.rows if not r["feasible"]])
    assert "</script>" in page.find_element("id", "refused").text


@pytest.mark.slow
def test_headings_sort_both_ways_with_the_unknown_last(page: Any) -> None:
    def latencies() -> list[str]:
        return [row.text for row in find(page, "tr.candidate td:nth-child(3)")]

    heading = "#table th:nth-child(3) button"
    click(page, heading)
    ascending = latencies()
    assert find(page, "#table th:nth-child(3)")[0].get_attribute("aria-sort") == "ascending"
    click(page, heading)
    descending = latencies()
    known = [text for text in ascending if not text.startswith(UNKNOWN)]
    assert len(known) > 10
    assert [text for text in descending if not text.startswith(UNKNOWN)] != known
    assert ascending[-1].startswith(UNKNOWN)
    assert descending[-1].startswith(UNKNOWN)


@pytest.mark.slow
@pytest.mark.parametrize(
    "tab",
    ["throughput", "memory", "energy", "cost", "pareto", "operators", "roofline", "latency"],
)
def test_each_tab_draws_its_chart(page: Any, tab: str) -> None:
    click(page, f"[data-tab={tab}]")
    assert find(page, f"[data-tab={tab}]")[0].get_attribute("aria-selected") == "true"
    assert len(find(page, "#chart svg")) == 1
    if tab == "roofline":
        assert len(find(page, "#chart path.roof")) > 10
        before = page.find_element("id", "caption").text
        page.execute_script(
            "document.querySelectorAll('#chart circle[role=button]')[5]"
            ".dispatchEvent(new MouseEvent('click', {bubbles: true}))"
        )
        assert page.find_element("id", "caption").text != before


@pytest.mark.slow
def test_the_front_is_drawn_against_what_the_reader_picks(page: Any, result: Comparison) -> None:
    click(page, "[data-tab=pareto]")
    click(page, "[data-axis=memory]")
    memory = len(find(page, "#chart circle"))
    known = [r for r in result.rows if r["feasible"] and r["latency_s"] and r["memory_bytes"]]
    assert memory == len(known)
    click(page, "[data-axis=cost]")
    assert 0 < len(find(page, "#chart circle")) < memory
    click(page, "[data-tab=latency]")


@pytest.mark.slow
def test_the_operators_are_those_of_the_candidate_picked(page: Any, result: Comparison) -> None:
    click(page, "[data-tab=operators]")
    shown = page.execute_script("return state.chosen")
    row = result.rows[shown]
    assert len(find(page, "#chart svg g")) == min(20, len(row["operators"]))
    click(page, "[data-tab=latency]")


@pytest.mark.slow
def test_a_price_of_the_readers_own_changes_the_cost(page: Any) -> None:
    page.execute_script("document.querySelector('tr.candidate:not(.refused)').click()")
    field = find(page, "td.detail .pricing input")[0]
    before = find(page, "td.detail .pricing")[0].text
    page.execute_script(
        "arguments[0].value = '123'; arguments[0].dispatchEvent(new Event('input'))", field
    )
    assert find(page, "td.detail .pricing")[0].text != before
    page.execute_script("document.querySelector('tr.candidate:not(.refused)').click()")


@pytest.mark.slow
def test_filters_narrow_the_chart_and_the_table(page: Any, result: Comparison) -> None:
    click(page, "[data-family=tpu]")
    tpus = [r for r in result.rows if r["family"] == "tpu"]
    assert len(find(page, "tr.candidate")) == len(tpus)
    search = page.find_element("id", "search")
    search.send_keys("v5e")
    assert len(find(page, "tr.candidate")) == len([r for r in tpus if "v5e" in r["target"]])
    page.execute_script(
        "arguments[0].value = ''; arguments[0].dispatchEvent(new Event('input'))", search
    )
    click(page, "[data-family=all]")
    assert len(find(page, "tr.candidate")) == len(result.rows)


@pytest.mark.slow
def test_a_row_opens_with_calibration_and_notes(page: Any) -> None:
    page.execute_script("document.querySelector('tr.candidate:not(.refused)').click()")
    detail = find(page, "td.detail")[0].text
    assert "Calibrated on" in detail
    page.execute_script("document.querySelector('tr.candidate:not(.refused)').click()")
    assert not find(page, "td.detail")


@pytest.mark.slow
def test_the_theme_switches(page: Any) -> None:
    def background() -> str:
        return str(page.execute_script("return getComputedStyle(document.body).backgroundColor"))

    before = background()
    click(page, "#theme")
    assert background() != before
    click(page, "#theme")
    assert background() == before


@pytest.mark.slow
def test_a_phone_needs_no_sideways_scrolling(page: Any) -> None:
    size = {"width": 375, "height": 800, "deviceScaleFactor": 1, "mobile": True}
    page.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    wide = page.execute_script("return document.documentElement.scrollWidth")
    page.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
    assert wide <= 375


@pytest.mark.slow
def test_a_generator_is_drawn_by_its_context(
    page: Any, shared_data: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> None:
    made = compare(
        shared_data("llm-shakespeare"),
        ["nvidia-h100-sxm", "nvidia-t4", "tpu-v5e", "amd-zcu104"],
        context=128,
        new_tokens=64,
    )
    file = tmp_path_factory.mktemp("generator") / "generator.html"
    file.write_text(report.to_html(made), encoding="utf-8")
    here = page.current_url
    page.get(file.as_uri())
    click(page, "[data-tab=context]")
    assert find(page, "[data-tab=context]")[0].get_attribute("aria-selected") == "true"
    known = [row for row in made.rows if row["feasible"] and row["serving"]]
    assert len(known) == 3
    points = find(page, "#chart svg circle")
    assert len(points) == sum(len(row["serving"]["by_context"]) for row in known)
    assert len(find(page, "#chart svg path.stroke")) == len(known)
    caption = page.find_element("id", "caption").text
    assert "tokens a second by the length" in caption
    hovered = page.execute_script(
        "const at = document.querySelector('#chart svg circle');"
        "at.dispatchEvent(new PointerEvent('pointermove', {bubbles: true}));"
        "return document.body.innerText"
    )
    assert "a step, caches" in hovered
    size = {"width": 390, "height": 844, "deviceScaleFactor": 1, "mobile": True}
    page.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    assert page.execute_script("return document.documentElement.scrollWidth") <= 390
    page.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
    assert page.get_log("browser") == []
    page.get(here)


@pytest.mark.slow
def test_an_explanation_draws_its_layers_path_and_mixes(
    page: Any, tmp_path_factory: pytest.TempPathFactory
) -> None:
    from trivium.compiler.explain.run import explain
    from trivium.models import digits

    folder = tmp_path_factory.mktemp("explained")
    *_, images, labels = digits.split()
    np.savez(folder / "test.npz", image=images[:64], y=labels[:64])
    made = explain(
        digits.cnn(), ["int8", "prune-50"], folder / "test.npz", max_drop=0.05, objective="memory"
    ).to_json()
    file = folder / "explained.html"
    file.write_text(report.explanation_html(made), encoding="utf-8")
    here = page.current_url
    page.get(file.as_uri())
    layers = made["recipes"][0]["layers"]
    assert len(find(page, "#layers svg g")) == len([x for x in layers if x["output_noise"]])
    assert len(find(page, "#path circle")) > len(layers)
    assert len(find(page, "#front circle")) == len(made["budget"]["front"])
    assert len(find(page, "#table tbody tr.candidate")) == len(layers)
    click(page, "[data-recipe='1']")
    assert len(find(page, "#table tbody tr.candidate")) == len(made["recipes"][1]["layers"])
    click(page, "#table tbody tr.candidate")
    assert find(page, "td.detail td")
    carried = page.execute_script("return JSON.parse(document.getElementById('data').textContent)")
    assert carried == json.loads(json.dumps(made))
    size = {"width": 375, "height": 800, "deviceScaleFactor": 1, "mobile": True}
    page.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    assert page.execute_script("return document.documentElement.scrollWidth") <= 375
    page.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
    assert page.get_log("browser") == []
    page.get(here)


@pytest.mark.slow
def test_nothing_was_logged_injected_or_requested(page: Any) -> None:
    assert page.execute_script("return window.hacked") is None
    assert page.get_log("browser") == []
    requested = [
        json.loads(entry["message"])["message"]["params"]["request"]["url"]
        for entry in page.get_log("performance")
        if json.loads(entry["message"])["message"]["method"] == "Network.requestWillBeSent"
    ]
    assert all(url.startswith(("file:", "data:")) for url in requested)
    # The pages themselves, and nothing besides.
    opened = {url for url in requested if url.startswith("file:")}
    assert all(
        url.endswith(("/report.html", "/explained.html", "/generator.html")) for url in opened
    )


@pytest.fixture
def plan_page(browser: Any, result: Comparison, tmp_path: Path) -> Any:
    chosen = choose(result.candidates, Constraints(max_latency_s=0.02), "cost")
    file = tmp_path / "plan.html"
    file.write_text(report.to_html(chosen), encoding="utf-8")
    browser.get(file.as_uri())
    return browser


@pytest.mark.slow
def test_the_page_of_a_plan_opens_with_its_answer_and_gives_each_reason(plan_page: Any) -> None:
    data = plan_page.execute_script("return data")
    assert plan_page.find_element("id", "answer").text == data["answer"]
    assert "latency at most 20.0 ms" in plan_page.find_element("id", "subtitle").text
    assert find(plan_page, "[data-tab=cost]")[0].get_attribute("aria-selected") == "true"
    reasons = [one.text for one in find(plan_page, "tr.why")]
    lost = [row for row in data["candidates"] if row["verdict"] != "best"]
    assert len(reasons) == len(lost)
    for text, row in zip(reasons, lost, strict=True):
        assert text.startswith(row["verdict"][:40])
        assert (row["wins_if"] or "") in text


@pytest.mark.slow
def test_a_phone_shows_figures_and_reasons_without_scrolling_the_page(plan_page: Any) -> None:
    try:
        plan_page.execute_cdp_cmd(
            "Emulation.setDeviceMetricsOverride",
            {"width": 390, "height": 844, "deviceScaleFactor": 1, "mobile": True},
        )
        plan_page.refresh()
        assert plan_page.execute_script("return document.documentElement.scrollWidth") <= 390
        # The first figure is in sight, and so is every reason.
        edges = plan_page.execute_script(
            "return [...document.querySelectorAll('tr.candidate td.number:nth-child(3), tr.why div,"
            " tr.candidate td.number:nth-child(4)')].map(e => e.getBoundingClientRect())"
            ".filter(box => box.width).map(box => box.left)"
        )
        assert edges
        assert max(edges) < 390
        widths = plan_page.execute_script(
            "return [...document.querySelectorAll('tr.why div')]"
            ".map(e => e.getBoundingClientRect().right)"
        )
        assert max(widths) <= 390
    finally:
        plan_page.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


@pytest.mark.slow
def test_a_chart_of_many_shows_the_first_and_all_on_demand(page: Any) -> None:
    page.refresh()
    known = page.execute_script(
        "for (let i = 0; i < 40; i++) rows.push({...rows.find(r => r.latency_s), id: 1000 + i});"
        "state.tab = 'latency'; draw(); return rows.filter(r => r.feasible && r.latency_s).length"
    )
    assert known > 40
    assert len(find(page, "#chart svg g")) <= 31
    click(page, "#chart button.more")
    assert len(find(page, "#chart svg g")) == known
