"""report.html in a real browser: what it shows, how mouse and keyboard work it, how fast it draws."""
import itertools
import shutil
import sys
import time

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import one_line_exit_2, refused, script

import analyze
from nanorank.figures import report as figures
from nanorank.figures.style import read_runs
from nanorank.spectra import gaussian_spectrum, measure

pytest.importorskip("plotly", reason="pip install -r requirements-report.txt")
HOSTILE = "</script><script>document.title = 'ran'</script><b>&lt;"
BROWSERS = ("chromium", "chromium-browser", "google-chrome")


def write_tables(folder, runs, layers=3, n_head=4, r=8, stacks=("",), products=("qk", "ov")):
    """heads.csv and spectra.csv as analyze.py writes them, of random numbers. runs: {run folder: steps}."""
    rng = np.random.default_rng(0)
    heads, spectra = [], []
    places = list(itertools.product(stacks, range(layers), products, range(n_head)))
    for run, steps in runs.items():
        for step, (stack, layer, product, head) in itertools.product(steps, places):
            key = {"checkpoint": f"{run}/step_{step:07d}.pt", "step": step, "stack": stack, "layer": layer,
                   "head": head, "product": product, "d_head": r}
            s = np.sort(rng.exponential(size=r))[::-1]
            half = 1.1 * s.sum()
            heads.append({**key, "rank95": rng.integers(1, r), "nuclear": s.sum(), "half_sq_norm": half,
                          "norm_A": half**0.5, "norm_B": half**0.5, "gap_gaussian": 0.05})
            if product == "qk":  # a column that is filled only where it applies
                heads[-1]["planes95"] = rng.integers(1, r)
            if step == steps[-1]:
                spectra.append({**key, **{f"s{i}": x for i, x in enumerate(s, 1)}})
    for name, rows in (("heads", heads), ("spectra", spectra)):
        table = pd.DataFrame(rows)
        table = table.drop(columns="stack") if stacks == ("",) else table
        table.to_csv(folder / f"{name}.csv", index=False)


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api", reason="pip install -r requirements-dev.txt")
    paths = [path for path in map(shutil.which, BROWSERS) if path]
    if not paths:
        pytest.skip("no browser: apt-get install chromium")
    flags = ["--no-sandbox", "--disable-background-networking", "--disable-component-update"]
    with playwright.sync_playwright() as driver:
        yield driver.chromium.launch(executable_path=paths[0], args=flags)


@pytest.fixture
def visit(browser):
    """visit(folder): its report.html open in a browser. Nothing in it may fail or be fetched."""
    problems, fetched = [], []
    with browser.new_context(offline=True) as context:
        def go(folder, width=1280):
            path = folder / "report.html"
            page = context.new_page()
            page.set_viewport_size({"width": width, "height": 860})
            page.on("console", lambda message: problems.append(message.text))
            page.on("pageerror", lambda error: problems.append(str(error)))
            page.on("request", lambda request: fetched.append(request.url))
            page.goto(path.as_uri())
            page.wait_for_selector("body[data-drawn]", timeout=20_000)
            return page

        yield go
    assert not problems
    assert all(url.startswith(("file:", "data:", "blob:")) for url in fetched), fetched


def click_cell(page, panel, x, y, columns, rows):
    """Clicks the cell in column x and row y of a heatmap."""
    box = page.locator(f"#{panel} .nsewdrag").bounding_box()
    at = box["x"] + box["width"] * (x + 0.5) / columns, box["y"] + box["height"] * (y + 0.5) / rows
    page.mouse.move(*at)
    page.mouse.click(*at)


def cells(page):
    """{metric: [the selected head's number in each run]}."""
    texts = "trs => trs.map(tr => [...tr.cells].map(cell => cell.textContent))"
    lines = page.eval_on_selector_all("#numbers tr", texts)
    return {name: numbers for name, *numbers in lines}


def traces(page, panel, key):
    """The numbers `key` of each trace of a plot, None where there is none."""
    return page.evaluate("([id, key]) => document.getElementById(id).data.map(t => Array.from(t[key] ?? []))",
                         [panel, key])


def row_of(table, **values):
    """The one row of a table with these values."""
    for name, x in values.items():
        table = table[table[name] == x]
    assert len(table) == 1
    return table.iloc[0]


@pytest.mark.slow
def test_two_runs_with_snapshots(tmp_path, visit):
    """A click, arrow keys, the slider and the menus change what is shown to what the CSV files have."""
    write_tables(tmp_path, {"out/a": (0, 10, 20), "out/b": (0, 20)})
    heads, spectra = (pd.read_csv(tmp_path / f"{name}.csv") for name in ("heads", "spectra"))
    figures.report(str(tmp_path))
    page = visit(tmp_path)

    def assert_shown(layer, head, product="qk", steps=(20, 20), metric="rank95"):
        name = [f"out/{run}/step_{step:07d}.pt" for run, step in zip("ab", steps)]
        want = [row_of(heads, checkpoint=x, layer=layer, head=head, product=product)[metric] for x in name]
        got = cells(page)
        assert [float(x) for x in got[metric]] == pytest.approx(want, rel=1e-3)
        assert got["step"] == [str(step) for step in steps]
        assert f"Layer {layer}, head {head}: {metric} " in page.inner_text("#status")

    assert_shown(0, 0)
    click_cell(page, "map1", 2, 1, columns=4, rows=3)
    assert_shown(1, 2)
    lines = traces(page, "spectrum", "y")
    for line, run in zip(lines[::2], "ab", strict=True):
        s = row_of(spectra, checkpoint=f"out/{run}/step_0000020.pt", layer=1, head=2, product="qk").loc["s1":]
        assert line == pytest.approx(list(s), rel=1e-6)
    assert [sum(line) for line in lines[1::2]] == pytest.approx(
        [0.95 * float(x) for x in cells(page)["half_sq_norm"]], rel=1e-3)  # gap_gaussian is 0.05

    # by keyboard: the map is reached with Tab, its focus is seen, arrows stop at its edge
    page.focus("#time")
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.id") == "map0"
    assert page.eval_on_selector("#map0", "map => getComputedStyle(map).outlineStyle") == "solid"
    for key in ("ArrowDown", "ArrowDown", "ArrowRight"):
        page.keyboard.press(key)
    assert_shown(2, 3)
    page.keyboard.press("ArrowUp")
    page.keyboard.press("ArrowLeft")
    assert_shown(1, 2)

    # the slider: each run's last checkpoint up to that step, without singular values before the end
    page.focus("#time")
    page.keyboard.press("ArrowLeft")
    assert_shown(1, 2, steps=(10, 0))
    assert "last checkpoint alone" in page.inner_text("#note")
    assert not traces(page, "spectrum", "y") and not page.locator("#spectrum").is_visible()
    page.keyboard.press("ArrowRight")
    assert page.inner_text("#note") == "" and len(traces(page, "spectrum", "y")) == 4

    # the menus: a product has the metrics that it has; points of the scatter plot select too
    page.select_option("#metric", label="planes95")
    assert_shown(1, 2, metric="planes95")
    page.select_option("#product", "1")
    assert page.locator("#metric option:checked").inner_text() == "rank95"
    assert_shown(1, 2, product="ov")
    x, y = (traces(page, "scatter", key)[1] for key in "xy")
    own = heads.query("checkpoint == 'out/a/step_0000020.pt' and product == 'ov'")
    assert x == pytest.approx(list(own["half_sq_norm"])) and y == pytest.approx(list(own["nuclear"]))
    page.locator("#scatter .scatterlayer .trace").nth(1).locator(".point").nth(7).hover(force=True)
    assert "layer 1, head 3" in page.locator("#scatter .hoverlayer").text_content()
    page.mouse.down()
    page.mouse.up()
    assert_shown(1, 3, product="ov")


@pytest.mark.parametrize("width", [1280, 800])
def test_small_models_stacks_and_missing_spectra(tmp_path, visit, width):
    """Two products in all; then stacks, products of any name, five runs; nothing is wider than the window."""
    write_tables(tmp_path, {"out/one": (5,)}, layers=1, n_head=1)
    (tmp_path / "spectra.csv").unlink()
    figures.report(str(tmp_path))
    page = visit(tmp_path, width)
    assert "no singular values" in page.inner_text("#note")
    hidden = ("#stack", "#run0", "#run1", "#time", "#map1")
    assert not any(page.locator(part).is_visible() for part in hidden)
    assert page.evaluate("document.documentElement.scrollWidth") <= width

    runs = {f"out/{'long_name_' * 4}{i}": (5,) for i in range(5)}
    write_tables(tmp_path, runs, stacks=("encoder", "cross"), products=("qk of a group", "ov"))
    figures.report(str(tmp_path))
    page = visit(tmp_path, width)
    page.select_option("#stack", label="cross")
    page.select_option("#run1", "3")
    assert "Layer cross 0, head 0" in page.inner_text("#status")
    assert page.inner_text("#name1") == "rank95, qk of a group, ...3, step 5"
    assert page.evaluate("document.documentElement.scrollWidth") <= width


def test_a_stack_that_lacks_a_product(tmp_path, visit):
    """Keys are shared in the text alone: the other stack shows another product instead."""
    write_tables(tmp_path, {"out/one": (5,)}, stacks=("text", "vision"), products=("qk", "qk_stacked"))
    heads = pd.read_csv(tmp_path / "heads.csv")
    heads[(heads["stack"] == "text") | (heads["product"] == "qk")].to_csv(tmp_path / "heads.csv", index=False)
    figures.report(str(tmp_path))
    page = visit(tmp_path)
    page.select_option("#product", "1")
    page.select_option("#stack", label="vision")
    assert page.input_value("#product") == "0"
    assert "Layer vision 0, head 0: rank95" in page.inner_text("#status")


def test_a_name_is_no_markup(tmp_path, visit):
    write_tables(tmp_path, {f"out/{HOSTILE}": (1, 2)})
    figures.report(str(tmp_path))
    page = visit(tmp_path)
    assert page.title() == "Attention heads"
    assert HOSTILE.rpartition("/")[2] in page.inner_text("#name0")
    assert HOSTILE.rpartition("/")[2] in page.locator("#spectrum .legendtext").first.text_content()


@pytest.mark.slow
def test_2048_products(tmp_path, visit):
    """Llama 2 7B's 32 layers of 32 heads of 128: drawn in three seconds, under 10 MB with two long runs."""
    write_tables(tmp_path, {"out/a": (0,)}, layers=32, n_head=32, r=128)
    figures.report(str(tmp_path))
    seconds = []
    for _ in range(3):  # the machine may be busy with other tests
        start = time.perf_counter()
        page = visit(tmp_path)
        seconds.append(time.perf_counter() - start)
        if seconds[-1] < 3:
            break
    assert min(seconds) < 3
    click_cell(page, "map0", 31, 30, columns=32, rows=32)
    assert "Layer 30, head 31" in page.inner_text("#status")

    # two such runs, as the CSV files would be: checkpoints in between are left out, and this is said
    one = read_runs(str(tmp_path / "heads.csv"), ()), read_runs(str(tmp_path / "spectra.csv"), ())
    heads, spectra = ([table.assign(run=run, checkpoint=f"{run}{i}") for run in "ab" for i in range(20)]
                      for table in one)
    data = figures.page_data(pd.concat(heads), pd.concat([spectra[19], spectra[39]]))
    assert [run["left_out"] for run in data["runs"]] == [20 - len(run["steps"]) for run in data["runs"]]
    ends = [run["checkpoints"][i] for run in data["runs"] for i in (0, -1)]
    assert ends == ["a0", "a19", "b0", "b19"]
    size = sum(len(run["values"]) + len(run["spectra"]) for run in data["runs"])
    assert 2e6 < size < 5e6


@pytest.mark.parametrize("d_A, d_B, r", [(96, 96, 16), (1024, 1024, 64), (64, 512, 32), (24, 24, 24)])
def test_gaussian_curve(d_A, d_B, r):
    """From gap_gaussian alone: the mean spectrum of random factors of these shapes."""
    g = torch.Generator().manual_seed(1)
    A, B = (torch.randn(40, d, r, generator=g, dtype=torch.float64) for d in (d_A, d_B))
    A, B = (X / torch.linalg.matrix_norm(X, keepdim=True) for X in (A, B))
    direct = measure(A, B, exact=True)[0].mean(0).numpy()
    assert gaussian_spectrum(d_A, d_B, r) == pytest.approx(direct, abs=0.05 * direct[0])
    curve = figures.gaussian_curve(direct.sum(), r)
    assert curve == pytest.approx(direct, abs=0.05 * direct[0])
    assert sum(curve) == pytest.approx(direct.sum(), rel=1e-3)


def test_the_command_line(train, tmp_path, visit):
    """A trained run with snapshots: analyze.py --report, and scripts.figures draws the same page again."""
    train(tmp_path / "run", max_iters=2, snapshot_steps="0,1")
    flags = ["--report", "--figure=False", "--device=cpu", f"--out_dir={tmp_path}"]
    done = script("analyze.py", tmp_path / "run", *flags)
    assert done.returncode == 0 and done.stdout.endswith(f"report: {tmp_path}/report.html\n"), done.stderr
    page = (tmp_path / "report.html").read_bytes()
    assert script("-m", "scripts.figures", "report", tmp_path).stdout.strip() == f"{tmp_path}/report.html"
    assert (tmp_path / "report.html").read_bytes() == page
    page = visit(tmp_path)
    click_cell(page, "map0", 1, 1, columns=2, rows=2)
    s = row_of(pd.read_csv(tmp_path / "spectra.csv"), layer=1, head=1, product="qk").loc["s1":]
    assert traces(page, "spectrum", "y")[0] == pytest.approx(list(s), rel=1e-6)
    page.focus("#time")
    page.keyboard.press("Home")
    assert cells(page)["step"] == ["0"]


def test_without_plotly(tmp_path, monkeypatch):
    """Refused in one line before anything is measured."""
    monkeypatch.setitem(sys.modules, "plotly.offline", None)
    monkeypatch.setattr(analyze, "report", True)
    monkeypatch.setattr(analyze, "out_dir", str(tmp_path / "out"))
    (tmp_path / "a.pt").touch()
    with refused("pip install -r requirements-report.txt"):
        analyze.main([str(tmp_path / "a.pt")])
    assert not (tmp_path / "out").exists()
    code = "import runpy, sys; sys.modules['plotly'] = None; sys.argv[0] = sys.argv.pop(1); " \
           "runpy.run_path(sys.argv[0], run_name='__main__')"
    refusal = script("-c", code, "analyze.py", tmp_path / "a.pt", "--report")
    one_line_exit_2(refusal, "requirements-report.txt")
