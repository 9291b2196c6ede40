"""A real browser opens JupyterLab, runs notebooks over stored results and looks at their pictures."""

from __future__ import annotations

import base64
import io
import json
import secrets
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import matplotlib.image
import numpy as np
import pytest

from obdlab.lab.paper.questions import QUESTIONS
from obdlab.lab.run.rows import RowStore
from obdlab.lab.run.spec import Spec
from obdlab.lab.show.report import run_notebook
from obdlab.lab.testbed.process import Daemon
from obdlab.lab.workbench import folder
from tests import capabilities
from tests.lab.declared import declared
from tests.lab.paper.rows import start_rows, store_grid, store_starts

# What the two programs' own event loops warn of is theirs.
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
]

#: Kernels and browsers start slowly on a busy machine.
PATIENCE_S = 240
_OUTPUT = ".jp-OutputArea-output"


@contextmanager
def jupyterlab(root: Path, work: Path) -> Iterator[str]:
    """JupyterLab on the loopback address, with nothing of this user's: its address, %s for a notebook's path."""
    token = secrets.token_hex(16)
    for name in ("config", "data", "runtime", "ipython"):
        (work / name).mkdir(parents=True)
    # No question about news over the notebook.
    news = work / "settings" / "@jupyterlab" / "apputils-extension" / "notification.jupyterlab-settings"
    news.parent.mkdir(parents=True)
    news.write_text(json.dumps({"fetchNews": "false", "checkForUpdates": False}))
    environment = {
        "HOME": str(work),
        "IPYTHONDIR": str(work / "ipython"),
        "JUPYTER_CONFIG_DIR": str(work / "config"),
        "JUPYTER_DATA_DIR": str(work / "data"),
        "JUPYTER_RUNTIME_DIR": str(work / "runtime"),
        "JUPYTERLAB_SETTINGS_DIR": str(work / "settings"),
        "JUPYTERLAB_WORKSPACES_DIR": str(work / "workspaces"),
        "JUPYTER_PREFER_ENV_PATH": "1",
    }
    command = [sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", "--LabApp.news_url=None"]
    command += ["--ServerApp.ip=127.0.0.1", "--ServerApp.port=0", f"--IdentityProvider.token={token}"]
    command += [f"--ServerApp.root_dir={root}", "--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate"]
    server = Daemon("jupyterlab", command, work / "jupyterlab.log", environment)
    try:
        server.wait_for(lambda: _port(work / "runtime") is not None, "no address", PATIENCE_S)
        yield f"http://127.0.0.1:{_port(work / 'runtime')}/lab/tree/%s?reset&token={token}"
    finally:
        server.stop(60)


def _port(runtime: Path) -> int | None:
    for note in runtime.glob("jpserver-*.json"):
        with suppress(ValueError):  # it is being written
            return int(json.loads(note.read_text())["port"])
    return None


@contextmanager
def browser(work: Path) -> Iterator[Any]:
    """Debian's chromium without a window, driven by its own driver; it asks nobody but the pages it is sent to."""
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = "/usr/bin/chromium"
    for argument in (
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-dev-shm-usage",
        "--disable-background-networking",
        "--disable-component-update",
        "--disable-sync",
        "--no-first-run",
        "--hide-scrollbars",
        "--window-size=1400,1600",
        f"--user-data-dir={work / 'chromium'}",
    ):
        options.add_argument(argument)
    service = webdriver.ChromeService("/usr/bin/chromedriver", log_output=str(work / "chromedriver.log"))
    driver = webdriver.Chrome(options, service)
    driver.set_page_load_timeout(PATIENCE_S)
    try:
        yield driver
    finally:
        driver.quit()


@pytest.fixture
def stored(tmp_path: Path) -> Path:
    """Results of two experiments, as if measured."""
    index = Spec.from_values({"name": "index", "kind": "index", "repeats": 3})
    store_grid(tmp_path / "results" / "index", index, {"batch_m_s": 3.0, "lookup_us": 5.0, "merge_ms": 20.0})
    starts = declared("start", snapshotters=("overlayfs", "obdlab"), a_a=False, repeats=3, disks=("native", "cloud"))
    store_starts(tmp_path / "results" / "start", starts, start_rows())
    return tmp_path / "results"


def opened(driver: Any, address: str) -> None:
    """Open a notebook, and return once its kernel is idle."""
    driver.get(address)
    wait(driver, lambda: find(driver, ".jp-Notebook .jp-CodeCell"), "no notebook")
    # The circle in the tool bar is idle before there is a kernel; whoever runs cells then is asked for one.
    wait(driver, lambda: "| Idle" in find(driver, "#jp-main-statusbar")[0].text, "no kernel")


def run_all(driver: Any) -> None:
    """Choose Run → Run All Cells from the menu, and return once every cell has run; a cell that complains fails."""
    press(driver, "Run", "runmenu:run-all")

    def ran() -> bool:
        errors = [each.text for each in find(driver, f"{_OUTPUT}[data-mime-type='application/vnd.jupyter.stderr']")]
        assert not errors, errors
        prompts = [each.get_attribute("textContent") for each in find(driver, ".jp-CodeCell .jp-InputPrompt")]
        return all(prompt.strip("[]: ").isdecimal() for prompt in prompts)

    wait(driver, ran, "cells have not run")


def find(driver: Any, selector: str) -> list[Any]:
    return list(driver.find_elements("css selector", selector))


def wait(driver: Any, condition: Any, what: str) -> None:
    from selenium.common.exceptions import StaleElementReferenceException
    from selenium.webdriver.support.ui import WebDriverWait

    waiting = WebDriverWait(driver, PATIENCE_S, 0.25, [StaleElementReferenceException])
    waiting.until(lambda _: condition(), what)


def pictures(driver: Any, selector: str) -> list[np.ndarray[Any, Any]]:
    """Return what the browser shows where images are: pixels of its own screenshots of them."""
    found = []
    for image in find(driver, selector):
        driver.execute_script("arguments[0].scrollIntoView({block: 'center'})", image)
        wait(driver, lambda image=image: image.get_property("complete") and image.size["width"] > 0, "no picture")
        found.append(matplotlib.image.imread(io.BytesIO(base64.b64decode(image.screenshot_as_base64)))[:, :, :3])
    return found


def assert_drawn(pixels: np.ndarray[Any, Any], colour: str, least: int = 50) -> None:
    """Fail for a picture that is blank, or has fewer than ``least`` pixels of a colour (hex digits)."""
    height, width, _ = pixels.shape
    assert height > 150
    assert width > 400
    wanted = np.array([int(colour[start : start + 2], 16) / 255 for start in (1, 3, 5)])
    assert (pixels.min(axis=2) < 0.5).mean() > 0.003, "hardly a dark pixel: no axes, no text"
    assert (np.abs(pixels - wanted).max(axis=2) < 0.12).sum() > least, f"nothing is {colour}"


def given(name: str, root: Path, parameters: dict[str, Any]) -> None:
    """Make a copy of a notebook below ``root``, with the cell of parameters that a reader would type."""
    import papermill  # slow to import

    (root / name).parent.mkdir(parents=True, exist_ok=True)
    source = folder("notebooks") / name
    papermill.execute_notebook(source, root / name, parameters, prepare_only=True, progress_bar=False)


@contextmanager
def lab(tmp_path: Path, notebooks: dict[str, dict[str, Any]]) -> Iterator[tuple[Any, str]]:
    """A browser, and the address of JupyterLab over these notebooks with their parameters."""
    capabilities.require("browser")
    work = tmp_path / "work"
    for name, parameters in notebooks.items():
        given(name, tmp_path / "notebooks", parameters)
    with jupyterlab(tmp_path / "notebooks", work) as address, browser(work) as driver:
        yield driver, address
    shutil.rmtree(work)


@pytest.mark.timeout(900)
def test_a_notebook_runs_in_jupyterlab_and_shows_its_figure(tmp_path: Path, stored: Path) -> None:
    name = "evaluation/index.ipynb"
    with lab(tmp_path, {name: {"results": str(stored), "measure": False}}) as (driver, address):
        opened(driver, address % name)
        run_all(driver)
        wait(driver, lambda: find(driver, f"{_OUTPUT} img"), "no figure")
        (figure,) = pictures(driver, f"{_OUTPUT} img")
        driver.save_screenshot(str(tmp_path / "index.png"))
        assert_drawn(figure, "#3b6e8f")
        assert_drawn(figure, "#b9a27a")  # the paper's line
        page = find(driver, ".jp-Notebook")[0].get_attribute("textContent")
        assert "One core looks up more than 6 million" in page
        assert "not reproduced" in page


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_all_notebooks_run_in_jupyterlab(tmp_path: Path, stored: Path) -> None:
    shown = {"results": str(stored), "measure": False}
    names = [f"evaluation/{asked.key}.ipynb" for asked in QUESTIONS]
    others: dict[str, dict[str, Any]] = {"evaluation/ledger.ipynb": {"results": str(stored)}}
    others["explorer.ipynb"] = {"results": str(stored)}
    with lab(tmp_path, {**dict.fromkeys(names, shown), **others}) as (driver, address):
        for name in (*names, "evaluation/ledger.ipynb"):
            opened(driver, address % name)
            run_all(driver)
            drawn = [asked for asked in QUESTIONS if asked.key == Path(name).stem and asked.runs[0].name == "start"]
            if drawn:
                wait(driver, lambda: find(driver, f"{_OUTPUT} img"), f"{name}: no figure")
                assert_drawn(pictures(driver, f"{_OUTPUT} img")[0], "#3b6e8f", 20)  # one dot, a median

        opened(driver, address % "explorer.ipynb")
        run_all(driver)
        wait(driver, lambda: len(find(driver, f"{_OUTPUT} img")) == 4, "not the two figures by widgets and by calls")
        for figure in pictures(driver, f"{_OUTPUT} img"):
            assert_drawn(figure, "#3b6e8f")
        # Another kind of start by a widget, and its picture is another one.
        before = find(driver, f"{_OUTPUT} img")[0].get_attribute("src")
        choose(driver, "start", "warm")
        wait(driver, lambda: find(driver, f"{_OUTPUT} img")[0].get_attribute("src") != before, "nothing changed")
        assert_drawn(pictures(driver, ".widget-image")[0], "#3b6e8f")
        driver.save_screenshot(str(tmp_path / "explorer.png"))


@pytest.mark.slow
@pytest.mark.kernel
@pytest.mark.timeout(1800)
def test_a_run_shows_its_progress_is_interrupted_and_goes_on(tmp_path: Path) -> None:
    results = tmp_path / "results"
    axes = {"segments": [1000], "layers": [1]}
    many: dict[str, Any] = {"kind": "index", "axes": axes, "repeats": 3000, "load_limit": 1000.0, "name": "many"}
    with lab(tmp_path, {"points.ipynb": {**many, "results": str(results)}}) as (driver, address):
        opened(driver, address % "points.ipynb")
        press(driver, "Run", "runmenu:run-all")
        wait(driver, lambda: "cell/s" in text_of(driver) or "s/cell" in text_of(driver), "no progress bar")
        press(driver, "Kernel", "kernelmenu:interrupt")
        wait(driver, lambda: "KeyboardInterrupt" in text_of(driver), "not interrupted")
    kept = RowStore(results / "many").rows()
    assert 0 < len(kept) < 3000
    assert not [row for row in kept if row.get("error")]
    # The same notebook, run again, measures the rest only: here the first ones again would be more than there are.
    few = {**many, "repeats": len(kept) + 1}
    run_notebook(folder("notebooks") / "points.ipynb", {**few, "results": str(results)}, tmp_path / "again.ipynb")
    assert len(RowStore(results / "many").rows()) <= len(kept) + 2


def press(driver: Any, menu: str, command: str) -> None:
    """Choose an entry of a menu."""
    (label,) = [each for each in find(driver, ".lm-MenuBar-itemLabel") if each.text == menu]
    label.click()
    wait(driver, lambda: find(driver, f"li[data-command='{command}']"), "no menu")
    find(driver, f"li[data-command='{command}']")[0].click()


def text_of(driver: Any) -> str:
    return str(find(driver, ".jp-Notebook")[0].get_attribute("textContent"))


def choose(driver: Any, label: str, value: str) -> None:
    """Choose a value in the widget of this label."""
    from selenium.webdriver.support.ui import Select

    for widget in find(driver, ".widget-dropdown"):
        if widget.find_element("css selector", "label").text == label:
            Select(widget.find_element("css selector", "select")).select_by_visible_text(value)
            return
    raise AssertionError(f"no widget is labelled {label}")
