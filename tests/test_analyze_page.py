"""The page of `titans analyze`, in the browser that is installed: one load of one page of 100,000 tokens."""

import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from playwright.sync_api import ConsoleMessage, Page, Request, sync_playwright

from titans_lm import Trace
from titans_lm.analyze.arrays import AXES, BY_HEAD
from titans_lm.analyze.page import PageData, PageText, Series, Sources, page

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
AXE = Path(__file__).parent / "assets/axe/axe.min.js"
TOKENS, SPIKE = 100_000, 50_123
HOSTILE = (
    "<script>window.ran = 1</script><img src=x onerror='window.ran = 1'>\"'&amp; \u202egnp.exe\u202c "
    "e\u0301 👩‍👩‍👧 שלום {{script}} \x1b[31m\x00</SCRIPT>"
).encode() + b"\xff\xe2\x82\n"
LINE = b"the quick brown fox jumps over the lazy dog 0123456789\n"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="no chromium is installed, in which the page is looked at"),
]


def made_trace(tokens: int) -> Trace:
    """Numbers without a meaning, and one peak."""
    random = np.random.default_rng(0)
    arrays = {"token_id": np.zeros(tokens, np.int64)}
    bits = random.gamma(2.0, 1.0, (2, tokens)).astype(np.float32)
    bits[:, 0], bits[:, SPIKE % tokens] = np.nan, (30, 2)
    arrays["bits"], arrays["bits_frozen"] = bits
    for name in BY_HEAD:
        arrays[name] = random.random((tokens, 2, 2), np.float32) * (100_000 if name == "surprise" else 1e-3)
    arrays["memory_gate"] = random.random((tokens, 2), np.float32)
    for name in ("prediction", "prediction_frozen"):
        arrays[name] = random.integers(0, 256, (tokens, 3)).astype(np.int32)
        arrays[name.replace("prediction", "probability")] = random.random((tokens, 3), np.float32)
    arrays["checkpoint"] = np.append(np.arange(0, tokens, 512), tokens)
    for name in ("memory_norm", "momentum_norm", "memory_change"):
        arrays[name] = random.random((len(arrays["checkpoint"]), 2, 2), np.float32)
    assert arrays.keys() <= AXES.keys()
    return Trace(arrays)


TRACE = made_trace(TOKENS)


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    content = (HOSTILE + LINE * (TOKENS // len(LINE)))[:TOKENS]
    content += LINE[: TOKENS - len(content)]
    data = PageData(
        "<b>title</b>\u202e", TRACE, [content[i : i + 1] for i in range(TOKENS)], {i: bytes([i]) for i in range(256)},
        [PageText("<i>one</i>\u202e.txt", 60_000), PageText("two.txt", 40_000)], {"model": "<u>m</u>"},
        others=[Series("frozen from 70,000", TRACE["bits_frozen"], 70_000)],
        compared=Series("another", TRACE["bits"][::-1].copy()),
        sources=[Sources(90_000, "gradient x input", [(200, 0.5), (80_000, -0.25)])],
    )  # fmt: skip
    path = tmp_path_factory.mktemp("page") / "index.html"
    path.write_text(page(data), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def seen() -> list[str]:
    """What the browser complained of, and what it fetched."""
    return []


@pytest.fixture(scope="module")
def tab(file: Path, seen: list[str]) -> Iterator[Page]:
    def complain(message: ConsoleMessage) -> None:
        seen.append(f"{message.type}: {message.text}")

    def fetched(request: Request) -> None:
        if request.url != file.as_uri():
            seen.append(f"fetched {request.url[:80]}")

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        tab = browser.new_page(viewport={"width": 1440, "height": 900}, color_scheme="light")
        tab.on("console", complain)
        tab.on("pageerror", lambda error: seen.append(f"error: {error}"))
        tab.on("request", fetched)
        tab.goto(file.as_uri())
        tab.wait_for_selector("html[data-ready]", timeout=60_000)
        yield tab
        browser.close()


def shown(value: float) -> str:
    """A number as the page shows it."""
    if np.isnan(value):
        return "\N{EN DASH}"
    size = abs(value)
    if size and (size < 0.001 or size >= 100_000):
        mantissa, _, exponent = f"{value:.2e}".partition("e")
        return f"{mantissa}e{int(exponent):+d}"
    return f"{value:.4f}" if size < 1 else f"{value:.3f}" if size < 100 else f"{value:.1f}"


def panel(tab: Page) -> dict[str, str]:
    return tab.eval_on_selector_all(
        "#panel dd", "all => Object.fromEntries(all.map(e => [e.dataset.value, e.textContent]))"
    )


def go(tab: Page, token: int) -> None:
    tab.fill("#goto", str(token))
    tab.press("#goto", "Enter")


def active(tab: Page) -> int:
    return tab.evaluate("active")


def choose(tab: Page, **values: str) -> None:
    for name, value in values.items():
        tab.select_option(f"#{name}", value)


def test_it_is_one_file_of_bounded_size(file):
    assert file.stat().st_size < 15_000_000
    text = file.read_text("utf-8")
    assert not re.search("[\u202a-\u202e\u2066-\u2069]", text)
    assert 'http-equiv="Content-Security-Policy" content="default-src &#x27;none&#x27;' in text


def test_hover_shows_the_numbers_of_the_trace(tab):
    choose(tab, measure="surprise", layer="1", head="0")
    for token in (SPIKE, 61_003, 99_999):
        go(tab, token)
        tab.mouse.move(0, 0)
        tab.hover(f"#pane [data-t='{token - 2}']")
        found, t = panel(tab), token - 2
        half = {name: float(np.float16(TRACE[name][t])) for name in ("bits", "bits_frozen")}
        assert found["bits"] == shown(half["bits"])
        assert found["bits_frozen"] == shown(half["bits_frozen"])
        for name in BY_HEAD:
            value = float(TRACE[name][t, 1, 0])
            assert float(found[name]) == pytest.approx(value, rel=1e-2), name
        assert float(found["memory_gate"]) == pytest.approx(float(TRACE["memory_gate"][t, 1]), rel=1e-2)
        at = t // 512
        assert found["memory_norm"] == shown(float(TRACE["memory_norm"][at, 1, 0]))
        words = tab.eval_on_selector_all("#panel .chance", "all => all.map(e => e.textContent)")
        expected = [*TRACE["probability"][t], *TRACE["probability_frozen"][t]]
        assert [float(word[:-1]) for word in words] == pytest.approx([100 * p for p in expected], abs=0.1)
        assert ("other0" in found) == (t >= 70_000)


def test_layer_and_measure_change_the_shading(tab):
    go(tab, 61_000)
    classes = {}
    for layer in ("0", "1"):
        choose(tab, measure="theta", layer=layer, head="1")
        cells = tab.eval_on_selector_all("#pane [data-t]", "all => all.map(e => [Number(e.dataset.t), e.className])")
        classes[layer] = dict(cells)
        high = np.quantile(TRACE["theta"][:, int(layer), 1], 0.99)
        level = {t: int(word[1:]) for t, names in cells for word in names.split() if word[0] == "l"}
        for t, found in level.items():
            assert found == pytest.approx(15 * min(1, TRACE["theta"][t, int(layer), 1] / high), abs=1.2)
        assert len(set(level.values())) > 10
    assert classes["0"] != classes["1"]
    choose(tab, measure="effect")
    signs = tab.eval_on_selector_all("#pane [data-t]", "all => all.map(e => [Number(e.dataset.t), e.className])")
    for t, names in signs:
        word = next((word for word in names.split() if word[0] in "np"), "")
        change = TRACE["bits"][t] - TRACE["bits_frozen"][t]
        assert word == "" or (word[0] == "n") == (change < 0)
    choose(tab, measure="bits", layer="-1", head="-1")


def chart_box(tab):
    tab.locator(".chart .u-over").first.scroll_into_view_if_needed()
    return tab.locator(".chart .u-over").first.bounding_box()


def in_sight(tab: Page, token: int) -> bool:
    """Whether the text has been scrolled to a token; a row that is only kept for screen readers does not count."""
    first, end = tab.evaluate("panes[0].tokensInSight()")
    return first <= token < end


def test_a_click_on_a_peak_goes_to_its_token(tab):
    go(tab, 10)
    box = chart_box(tab)
    tab.mouse.click(box["x"] + box["width"] * SPIKE / TOKENS, box["y"] + 20)
    assert active(tab) == SPIKE
    assert tab.is_visible(f"#pane [data-t='{SPIKE}'].active")
    assert in_sight(tab, SPIKE)


def test_a_brush_moves_the_text(tab):
    go(tab, 10)
    box = chart_box(tab)
    first, end = (box["x"] + box["width"] * share for share in (0.7, 0.75))
    tab.mouse.move(first, box["y"] + 30)
    tab.mouse.down()
    tab.mouse.move(end, box["y"] + 40, steps=4)
    tab.mouse.up()
    assert active(tab) == pytest.approx(70_000, abs=300)
    assert tab.is_visible(f"#pane [data-t='{active(tab)}'].region")
    assert in_sight(tab, active(tab))
    tab.click("#zoom")
    assert tab.evaluate("charts.range") == pytest.approx([70_000, 75_000], abs=300)
    tab.click("#whole")
    assert tab.evaluate("charts.range") == [0, TOKENS]
    assert tab.locator("#pane .region").count() == 0


def test_the_text_tells_the_charts_where_it_is(tab):
    go(tab, 10)
    tab.evaluate("panes[0].grid.scrollTop = 0.5 * panes[0].grid.scrollHeight")
    for _ in range(200):  # the browser tells of scrolling at its next frame; wait_for_function would need eval
        if abs(tab.evaluate("charts.sight[0]") - TOKENS // 2) < 4000:
            break
        tab.wait_for_timeout(25)
    assert tab.evaluate("charts.sight[0]") == pytest.approx(TOKENS // 2, abs=4000)
    assert tab.evaluate("panes[1].grid.scrollTop") == tab.evaluate("panes[0].grid.scrollTop")
    assert tab.locator("#pane .row").count() < 200


def test_the_keyboard_reaches_everything(tab):
    tab.evaluate("document.activeElement.blur()")
    tab.focus("#theme")
    reached = set()
    for _ in range(60):
        reached.add(
            tab.evaluate(
                "document.activeElement.id || document.activeElement.className || document.activeElement.tagName"
            )
        )
        if tab.evaluate("document.activeElement.dataset.go !== undefined"):
            break
        tab.keyboard.press("Tab")
    assert {"theme", "measure", "layer", "head", "goto", "peak", "pane", "pane2", "chart"} <= reached
    assert tab.evaluate("document.activeElement.dataset.go") is not None
    wanted = int(tab.evaluate("document.activeElement.dataset.go"))
    tab.keyboard.press("Enter")
    assert active(tab) == wanted
    assert tab.evaluate("document.activeElement.id") == "pane"
    go(tab, 60_500)
    for key, goal in (("ArrowRight", 60_501), ("ArrowLeft", 60_500)):
        tab.keyboard.press(key)
        assert active(tab) == goal
    tab.keyboard.press("ArrowDown")
    assert 60_500 < active(tab) <= 60_500 + len(LINE)
    assert f"token {active(tab):,}" in tab.inner_text("#said")
    assert tab.get_attribute("#pane", "aria-activedescendant") == f"pane-{active(tab)}"
    go(tab, SPIKE - 60)
    while active(tab) < SPIKE:
        before = active(tab)
        tab.keyboard.press("n")
        assert active(tab) > before
    assert active(tab) == SPIKE
    tab.focus(".chart")
    tab.keyboard.press("ArrowRight")
    assert active(tab) == SPIKE + TOKENS // 200
    tab.keyboard.press("Shift+ArrowRight")
    assert tab.evaluate("charts.region") == [SPIKE + TOKENS // 200, SPIKE + TOKENS // 100 + 1]
    tab.keyboard.press("Enter")
    assert tab.evaluate("charts.range") == tab.evaluate("charts.region")
    tab.keyboard.press("Escape")
    assert tab.evaluate("charts.range") == [0, TOKENS]
    assert tab.get_attribute(".chart", "aria-valuenow") == str(active(tab))


def test_text_is_shown_as_text_and_runs_nothing(tab):
    go(tab, 0)
    row = "".join(
        tab.eval_on_selector_all(
            "#pane [data-t]", f"all => all.filter(e => Number(e.dataset.t) < {len(HOSTILE)}).map(e => e.textContent)"
        )
    )
    assert "<script>window.ran = 1</script><img src=x onerror='window.ran = 1'>\"'&amp; ⟨U+202E⟩gnp.exe⟨U+202C⟩" in row
    assert row.endswith("e\u0301 👩‍👩‍👧 שלום {{script}} ␛[31m␀</SCRIPT>⟨FF⟩⟨E2⟩⟨82⟩↵")
    assert tab.evaluate("window.ran") is None
    assert tab.inner_text("h1") == "<b>title</b>⟨U+202E⟩"
    assert tab.locator("main img, main b, main i, main u, main script:not([type])").count() == 0
    at = len(HOSTILE[: HOSTILE.index("👩".encode())])
    go(tab, at + 4)
    assert tab.inner_text("#panel .glyph") == "👩‍👩‍👧"
    assert "part 5 of the 18 tokens" in tab.inner_text("#panel")
    assert "of <i>one</i>⟨U+202E⟩.txt" in tab.inner_text("#panel")


def test_sources_are_marked_and_lead_there(tab):
    go(tab, 90_000)
    assert tab.evaluate("charts.arcs.map(one => one.from)") == [200, 80_000]
    button = tab.locator("#lists button[data-go='80000']").first
    assert "−0.25" in button.inner_text()
    button.click()
    assert active(tab) == 80_000


@pytest.mark.parametrize(("theme", "width"), [("light", 1440), ("dark", 390)])
def test_axe_finds_no_serious_fault(tab, theme, width):
    tab.set_viewport_size({"width": width, "height": 900})
    if tab.evaluate("document.documentElement.dataset.theme") != theme:
        tab.click("#theme")
    choose(tab, measure="effect" if theme == "dark" else "bits")
    assert tab.evaluate("document.documentElement.scrollWidth") <= width
    tab.evaluate(AXE.read_text())
    found = tab.evaluate("axe.run(document, {resultTypes: ['violations']}).then(r => r.violations)")
    grave = [
        (one["id"], one["impact"], [node["html"][:120] for node in one["nodes"][:3]])
        for one in found
        if one["impact"] in ("serious", "critical", "moderate")
    ]
    assert not grave
    tab.set_viewport_size({"width": 1440, "height": 900})


def test_nothing_was_complained_of_or_fetched(tab, seen):
    assert seen == []
    tab.evaluate("""() => {
        const script = document.createElement("script");
        script.textContent = "window.ran = 1";
        document.body.append(script);
        const image = document.createElement("img");
        image.src = "https://example.org/x.png";
        document.body.append(image);
    }""")
    tab.wait_for_timeout(50)
    assert tab.evaluate("window.ran") is None
    assert any("Content Security Policy" in line for line in seen)
