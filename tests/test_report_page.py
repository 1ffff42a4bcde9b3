"""The report: one file that loads nothing, in which nothing that a run wrote is markup; and in a browser."""

import base64
import hashlib
import html
import json
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser

import pytest
from conftest import load_script
from stored_runs import config_of, falling_loss, record_of, store

from lora_one.reports.elements import data_block, element, serialised

EVIL = "</script></pre><script>document.title='taken'</script><img src=x onerror=\"document.title='taken'\">"
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
needs_browser = pytest.mark.skipif(BROWSER is None, reason="needs Chromium")

# What a reader would do, and what is then there; it stands behind the page's own program.
READER = """
const seen = {};
const all = (selector) => [...document.querySelectorAll(selector)];
try {
  const heading = all("h3").find((h) => h.textContent.startsWith("Exact match on the validation split"));
  const chart = heading.nextElementSibling, svg = chart.querySelector("svg");
  const curves = () => chart.querySelectorAll("path.curve").length;
  const point = (x, y) => svg.dispatchEvent(new PointerEvent("pointermove", { clientX: x, clientY: y }));
  const box = svg.getBoundingClientRect();
  Object.assign(seen, { title: document.title, images: all("img").length, curves: [curves()] });
  point(box.right - 14, box.top + 10); // the highest point of the last step
  seen.tip = chart.querySelector(".tip").textContent;
  const tip = chart.querySelector(".tip").getBoundingClientRect();
  seen.tipIsThere = tip.width > 0 && tip.top >= box.top && tip.bottom <= box.bottom && tip.right <= box.right;
  seen.behind = chart.querySelectorAll("path.curve.behind").length;
  const entry = chart.querySelector(".legend button");
  entry.click();
  seen.pressed = entry.getAttribute("aria-pressed");
  seen.curves.push(curves());
  entry.click();
  seen.curves.push(curves());
  const rates = () => all("#comparison tbody tr").map((row) => row.cells[2].textContent);
  const head = all("#comparison th button").find((button) => button.textContent === "test");
  seen.rates = [rates()];
  for (const _ of [1, 2]) { head.click(); seen.rates.push(rates()); }
  const filter = document.querySelector("input[type=search]");
  filter.value = "failed";
  filter.dispatchEvent(new Event("input"));
  seen.filtered = all("#runs-table tbody tr:not(.hidden)").length;
  const columns = () => all("#settings-table thead th:not(.hidden)").length;
  seen.columns = [columns()];
  document.querySelector("input[data-column='6']").click();
  seen.columns.push(columns());
  seen.loaded = performance.getEntriesByType("resource").length;
  seen.overflow = document.documentElement.scrollWidth - document.documentElement.clientWidth;
} catch (error) { seen.error = String(error); }
const report = document.createElement("pre");
report.id = "seen";
report.textContent = JSON.stringify(seen);
document.body.append(report);
"""


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """Six learning rates of two seeds, a failed run with an evil error, and a damaged record."""
    root = tmp_path_factory.mktemp("results")
    for number in range(6):
        for seed in (0, 1):
            config = config_of(seed, learning_rate=1e-3 * (number + 1))
            test = [0.3, 0.5, 0.9, 0.8, 0.7, 0.1][number] + 0.02 * seed
            store(root, record_of(seed, test, config=config), falling_loss(8, start=2 + number))
    config = config_of(2, learning_rate=1e-3)
    command = {"code": {"command": f"run_exp.py {EVIL}"}}
    store(
        root, record_of(2, status="failed", error=EVIL, config=config, method=EVIL, run_id="evil", **command)
    )
    (root / "broken").mkdir()
    (root / "broken" / "record.json").write_text("{")
    return root


@pytest.fixture(scope="module")
def page(results):
    """The page's file."""
    program = load_script("make_report")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["make_report.py", str(results)])
        program.main()
    return results / "report.html"


class Parsed(HTMLParser):
    """Start tags with their attributes, and the text of each script."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.scripts, self.text = [], [], ""
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_data(self, data):
        if self.tags[-1:] and self.tags[-1][0] == "script":
            self.scripts.append(data)
        self.text += data


def test_it_is_one_file_that_loads_nothing(page):
    parsed = Parsed(page.read_text())
    for tag, attributes in parsed.tags:
        assert tag not in ("link", "img", "iframe", "object", "embed", "base", "form")
        assert not {"src", "srcset", "action", "style"} & attributes.keys()
        assert not any(name.startswith("on") for name in attributes)
        assert attributes.get("href", "#").startswith("#")
    style = (page.parent / "report.html").read_text().split("<style>")[1].split("</style>")[0]
    assert "url(" not in style and "@import" not in style
    assert sum(tag == "script" for tag, _ in parsed.tags) == 2  # the data, and the program
    policy = next(a["content"] for _, a in parsed.tags if a.get("http-equiv") == "Content-Security-Policy")
    rules = dict(rule.split(" ", 1) for rule in policy.split("; "))
    assert rules.keys() == {"default-src", "style-src", "script-src", "base-uri", "form-action"}
    assert (rules["default-src"], rules["form-action"]) == ("'none'", "'none'")
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    assert rules["style-src"] == f"'sha256-{digest}'"


def test_what_a_run_wrote_is_text(page):
    parsed = Parsed(page.read_text())
    assert EVIL in parsed.text
    for _, attributes in parsed.tags:
        assert attributes.keys().isdisjoint({"onerror"})
        assert not any("taken" in value for name, value in attributes.items() if name != "data-value")
    figures = json.loads(parsed.scripts[0])
    assert len(figures) == 7
    assert "broken/record.json: damaged" in parsed.text


def test_data_that_would_end_its_block_is_the_same_data():
    block = serialised(data_block("d", [EVIL, "<!--", "&"]))
    assert block.count("<") == 3  # the document type's, and the element's own
    assert json.loads(Parsed(block).scripts[0]) == [EVIL, "<!--", "&"]


def test_signs_that_no_file_may_hold_are_left_out():
    text = serialised(element("p", "\ud800 a\x1b[31m\x00\n", title='"\udfff'))
    assert text == '<!doctype html>\n<p title="&quot;?">? a[31m\n</p>\n'


def test_states_errors_and_commands_are_there(page):
    text = Parsed(page.read_text()).text
    assert "14 runs: 1 failed, 12 finished, 1 damaged" in text
    assert "The same command goes on: python run_exp.py" in text
    assert "missing: tiny lora seed 2 was not run" in text


def test_many_long_runs_stay_small(tmp_path, monkeypatch):
    for number in range(40):
        for seed in range(5):
            config = config_of(seed, learning_rate=1e-4 * (number + 1), max_length=64 + number)
            store(tmp_path, record_of(seed, 0.5, config=config), falling_loss(400))
    program = load_script("make_report")
    monkeypatch.setattr(sys, "argv", ["make_report.py", str(tmp_path), "-o", str(tmp_path / "page.html")])
    program.main()
    assert (tmp_path / "page.html").stat().st_size < 2_000_000


def dom(path, tmp_path, width: int) -> str:
    """The document after its program has run, in a window of this width."""
    done = subprocess.run(
        [
            *(
                str(BROWSER),
                "--headless",
                "--no-sandbox",
                "--disable-gpu",
                "--no-first-run",
                "--disable-sync",
            ),
            *("--disable-background-networking", "--disable-component-update", "--hide-scrollbars"),
            *(f"--user-data-dir={tmp_path / 'profile'}", f"--window-size={width},900"),
            *("--virtual-time-budget=2000", "--dump-dom", f"file://{path}"),
        ],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert "<html" in done.stdout, done.stderr
    return done.stdout


@needs_browser
def test_a_browser_draws_it_under_its_own_policy(page, tmp_path):
    shown = dom(page, tmp_path, 1400)
    assert shown.count('class="curve"') > 30
    assert "<title>Runs in" in shown and "<img" not in shown


@needs_browser
@pytest.mark.parametrize("width", [400, 1400])
def test_a_reader_points_clicks_sorts_and_filters(page, tmp_path, width):
    text = re.sub(r"<meta http-equiv[^>]*>", "", page.read_text())
    assert text.count("</body>") == 1
    (tmp_path / "page.html").write_text(text.replace("</body>", f"<script>{{{READER}}}</script></body>"))
    shown = dom(tmp_path / "page.html", tmp_path, width)
    seen = json.loads(html.unescape(shown.split('<pre id="seen">')[1].split("</pre>")[0]))
    assert "error" not in seen, seen
    # Without the policy too, nothing that a run wrote is executed.
    assert seen["title"].startswith("Runs in") and seen["images"] == 0
    assert seen["tipIsThere"] and seen["behind"] == 5 and "optimiser step 8: 50.0 %" in seen["tip"]
    assert seen["curves"] == [6, 5, 6] and seen["pressed"] == "false"
    assert seen["rates"][0] == ["0.001", "0.002", "0.003", "0.004", "0.005", "0.006"]
    rising = ["0.006", "0.001", "0.002", "0.005", "0.004", "0.003"]
    assert seen["rates"][1] == rising
    assert seen["rates"][2] == rising[::-1]
    assert seen["filtered"] == 1
    assert seen["columns"] == [6, 7]
    assert (seen["loaded"], seen["overflow"]) == (0, 0)
