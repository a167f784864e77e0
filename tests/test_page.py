"""The page in a real browser, from disk: headless Chromium, driven by Selenium.

Skipped, with a reason, where there is no Chromium or no Selenium.
"""

import contextlib
import itertools
import json
import time

import matplotlib.image
import pytest
from page_factory import CHILD, DEAD, HOSTILE, N_LATENTS, PARENT, flags, write_world

import browse
from studies import screenshots
from studies.screenshots import chromium, why_not

pytestmark = [
    pytest.mark.processes,
    pytest.mark.skipif(bool(why_not()), reason=f"no browser: {why_not()}"),
]
SECONDS = 120  # to wait at most


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    folder = write_world(tmp_path_factory.mktemp("page"))
    (folder / "labels.json").write_text(json.dumps({"matryoshka": {"7": "<i>seven</i>"}}))
    browse.main(flags(folder, folder / "page", labels=folder / "labels.json"))
    return (folder / "page" / "index.html").as_uri()


@pytest.fixture(scope="module")
def driver():
    with chromium() as driver:
        yield driver


@pytest.fixture
def tab(driver, page):
    """The page, freshly opened; after the test nothing may be on the console."""
    tab = Tab(driver, page)
    tab.open("")
    yield tab
    assert [entry["message"] for entry in driver.get_log("browser")] == []


class Tab:
    """What one does in a browser."""

    def __init__(self, driver, page):
        self.driver, self.page = driver, page

    def open(self, address):
        self.driver.get("about:blank")
        self.driver.get(self.page + address)
        self.shown()

    def do(self, script, *arguments):
        return self.driver.execute_script(f"return {script}", *arguments)

    def until(self, script, *arguments):
        end = time.monotonic() + SECONDS
        while not self.do(script, *arguments):
            assert time.monotonic() < end, f"not within {SECONDS} s: {script}"
            time.sleep(0.02)

    def shown(self, address=None):
        """Waits until the view of the address is there."""
        if address is not None:
            self.until("decodeURIComponent(location.hash).startsWith(arguments[0])", address)
        self.until("document.getElementById('main').dataset.shown === location.hash")

    def all(self, selector):
        return self.driver.find_elements("css selector", selector)

    def one(self, selector):
        return self.driver.find_element("css selector", selector)

    def text(self, selector="main"):
        return self.do("document.querySelector(arguments[0]).textContent", selector)

    def keys(self, keys):
        self.one("body").send_keys(keys)

    def first_cells(self):
        return [
            int(text.split()[0])
            for text in self.do(
                "[...document.querySelectorAll('tbody tr td:first-child')].map(x => x.textContent)"
            )
        ]

    def type(self, selector, text):
        element = self.one(selector)
        element.clear()
        element.send_keys(text)


def test_the_list_opens_and_sorts(tab):
    assert "Latents of matryoshka" in tab.text("h1")
    assert tab.first_cells() == list(range(N_LATENTS))
    fired = tab.do("browse.lists.get(0).fired")
    expected = sorted(range(N_LATENTS), key=lambda j: (-fired[j], j))
    tab.one("#sort-density").click()
    tab.until("location.hash.includes('down=1')")
    assert tab.first_cells() == expected
    assert tab.one("th[aria-sort]").get_attribute("aria-sort") == "descending"
    tab.driver.refresh()
    tab.shown()
    assert tab.first_cells() == expected, "sorting survives a reload"
    tab.one("#sort-density").click()
    tab.until("document.querySelector('th[aria-sort=ascending]')")
    assert tab.first_cells()[0] == DEAD


def test_the_list_filters(tab):
    tab.do("(document.getElementById('filter-life').focus())")
    dead = tab.do("browse.lists.get(0).fired.filter(n => !n).length")
    assert dead
    for value, count in (
        ("dead", f"{dead} of 70 latents"),
        ("living", f"{70 - dead} of 70 latents"),
    ):
        tab.one(f"#filter-life option[value={value}]").click()
        tab.until("document.getElementById('status').textContent === arguments[0]", count)
    tab.one("#filter-level option[value='3']").click()
    tab.until("[...document.querySelectorAll('tbody tr')].length <= 4")
    assert set(tab.first_cells()) <= {4, 5, 6, 7}
    tab.type("#filter-low", "100.5")
    tab.until("document.querySelector('main').textContent.includes('No latent is like that')")


def test_text_in_the_examples_is_searched(tab):
    tab.type("#filter-text", "word30 ")
    tab.until("location.hash.includes('text=word30')")
    tab.until("/^\\d+ of 70 latents$/.test(document.getElementById('status').textContent)")
    found = tab.first_cells()
    for j in range(N_LATENTS):
        holds = tab.driver.execute_async_script(
            "const [j, done] = arguments; latentOf(0, j).then(l => done(l.top.some("
            "e => e[3].map(textOf).join('').includes('word30 '))))",
            j,
        )
        assert holds == (j in found)


def test_a_name_or_token_is_found(tab):
    tab.keys("/")
    tab.until("document.activeElement.id === 'search'")
    tab.one("#search").send_keys("SEVEN\n")
    tab.shown("#/matryoshka?q=SEVEN")
    assert tab.first_cells() == [7]
    tab.type("#search", "12\n")
    tab.shown("#/matryoshka/12")
    assert "Latent 12" in tab.text("h1")


def test_a_link_to_the_parent_and_back(tab):
    tab.open(f"#/matryoshka/{CHILD}")
    rows = tab.all("section table tbody tr")
    assert rows
    link = tab.one("section table a")
    assert link.text.split()[0] == str(PARENT)
    link.click()
    tab.shown(f"#/matryoshka/{PARENT}")
    assert f"Latent {PARENT} of" in tab.text("h1")
    children = tab.do("[...document.querySelectorAll('ul.tree a')].map(a => a.hash)")
    assert f"#/matryoshka/{CHILD}" in children
    tab.driver.back()
    tab.shown(f"#/matryoshka/{CHILD}")
    assert f"Latent {CHILD} of" in tab.text("h1")
    tab.driver.refresh()
    tab.shown(f"#/matryoshka/{CHILD}")
    assert f"Latent {CHILD} of" in tab.text("h1"), "a link survives a reload"


def test_the_keyboard_goes_everywhere(tab):
    tab.open("#/matryoshka/5")
    for key, address in (
        ("n", "#/matryoshka/6"),
        ("p", "#/matryoshka/5"),
        ("t", "#/matryoshka/tree"),
        ("l", "#/matryoshka"),
    ):
        tab.keys(key)
        tab.shown(address)
    tab.open(f"#/matryoshka/{CHILD}")
    tab.keys("u")
    tab.shown(f"#/matryoshka/{PARENT}")
    tab.keys("p")
    assert tab.do("location.hash") == f"#/matryoshka/{PARENT}", "there is none before it"
    tab.one("#label").send_keys("n")
    assert tab.do("location.hash") == f"#/matryoshka/{PARENT}", "typing is not steering"


def test_the_tree_opens(tab):
    tab.open("#/matryoshka/tree")
    assert not tab.all("details[open]")
    tab.do("document.querySelector('#forest summary').click()")
    tab.until("document.querySelectorAll('#forest details[open] li').length > 0")
    tab.one("#open-all").click()
    tab.until("!document.querySelector('#forest details:not([open])')")
    below = tab.do("browse.lists.get(0).parent.filter(p => p >= 0).length")
    roots = len(tab.all("#forest > li"))
    assert len(tab.all("#forest li")) <= below + roots + 5
    assert f"{below} latents below a parent" in tab.text()


def test_hostile_text_shows_as_text(tab):
    tab.open("#/matryoshka/3")
    seen = tab.text()
    texts = tab.do("browse.about.texts")
    for text in HOSTILE:
        expected = text.encode("utf-8", "replace").decode()
        assert expected in texts
    assert "<script>alert(1)</script>" in seen
    assert "</script><img src=x onerror=alert(2)>" in seen
    assert " &amp;" in seen
    assert "🦊" in seen
    assert "שלום" in seen
    assert "↵" in seen
    assert not tab.all("main img, main script, main i, main b")
    tab.open("#/matryoshka/7")
    assert "<i>seven</i>" in tab.text("h1")


def test_a_latent_or_sae_that_is_not_there_is_a_sentence(tab):
    tab.open("#/matryoshka/99999")
    assert "There is no latent 99999 in matryoshka: it has latents 0 to 69." in tab.text()
    tab.open("#/matryoshka/abc")
    assert "There is no latent abc in matryoshka" in tab.text()
    tab.open("#/other/3")
    assert "There is no SAE other here, only matryoshka, vanilla." in tab.text()
    tab.open("#/%E0%A4%A/3")
    assert "No such SAE" in tab.text("h1")


def test_a_dead_latent_has_a_page(tab):
    tab.open(f"#/matryoshka/{DEAD}")
    assert "It fires on none of these tokens." in tab.text()


def test_a_name_is_kept_and_saved(tab):
    tab.open("#/matryoshka/9")
    tab.type("#label", "nine & <b>\n")
    tab.until("document.getElementById('name').textContent === 'nine & <b>'")
    tab.driver.refresh()
    tab.shown()
    assert tab.text("#name") == "nine & <b>"
    names = tab.do("allNames()")
    assert names == {"matryoshka": {"7": "<i>seven</i>", "9": "nine & <b>"}}
    tab.type("#label", "\n")
    tab.until("document.getElementById('name').textContent !== 'nine & <b>'")


def test_the_nearest_latent_of_the_other_sae_is_beside_it(tab):
    tab.open("#/matryoshka/3")
    assert "Nearest in vanilla" in tab.text()
    link = next(a for a in tab.all("h3 a") if "/vanilla/" in a.get_attribute("href"))
    address = link.get_attribute("href")
    tab.do("arguments[0].click()", link)
    tab.until("location.href === arguments[0]", address)
    tab.shown()
    assert "of vanilla" in tab.text("h1")
    assert "Nearest in matryoshka" in tab.text()


def test_an_activation_shows_when_it_is_pointed_at_or_pressed(tab):
    tab.open("#/matryoshka/3")
    token = tab.one("ol.examples .peak")
    value = token.get_attribute("data-value")
    assert token.get_attribute("title") == f"activation {tab.do(f'short({value})')}"
    tab.do("arguments[0].click()", token)
    assert tab.do(f"short({value})") in tab.text("#status")


def test_every_control_has_a_label_and_headings_do_not_skip(tab):
    for address in ("", "#/matryoshka/3", "#/matryoshka/tree"):
        tab.open(address)
        assert tab.do(
            "[...document.querySelectorAll('input, select, textarea')].every(x => x.labels.length)"
        )
        levels = tab.do("[...document.querySelectorAll('main h1, main h2, main h3')]"
                        ".map(h => Number(h.tagName[1]))")  # fmt: skip
        assert levels[0] == 1
        assert all(b <= a + 1 for a, b in itertools.pairwise(levels))
        assert tab.do("document.documentElement.lang") == "en"
        assert tab.do("[...document.querySelectorAll('svg')].every(s => s.ariaLabel)")


CONTRAST = """(() => {
  const parse = (c) => c.match(/[\\d.]+/g).map(Number);
  const over = (top, under) => { const a = top[3] ?? 1;
    return under.map((u, i) => a * top[i] + (1 - a) * u).slice(0, 3); };
  const light = (c) => { const [r, g, b] = c.map((x) => (x /= 255) <= 0.03928 ? x / 12.92 :
    ((x + 0.055) / 1.055) ** 2.4); return 0.2126 * r + 0.7152 * g + 0.0722 * b; };
  let lowest = 99;
  for (const element of document.querySelectorAll('body *')) {
    const own = [...element.childNodes].some((n) => n.nodeType === 3 && n.data.trim());
    if (!own || !element.checkVisibility() || element.closest('.skip, option')) continue;
    const layers = [];
    for (let e = element; e; e = e.parentElement) layers.unshift(parse(getComputedStyle(e).backgroundColor));
    const back = layers.reduce((under, top) => over(top, under), [255, 255, 255]);
    const [a, b] = [light(parse(getComputedStyle(element).color)), light(back)].sort((x, y) => y - x);
    lowest = Math.min(lowest, (a + 0.05) / (b + 0.05));
  }
  return lowest;
})()"""  # noqa: E501


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_contrast_is_aa_in_light_and_dark(tab, theme):
    for address in ("", "#/matryoshka/3", "#/matryoshka/tree"):
        tab.open(address)
        tab.do("setTheme(arguments[0], false)", theme)
        assert tab.do(CONTRAST) >= 4.5


def test_a_phone_needs_no_sideways_scrolling(tab):
    size = {"width": 360, "height": 740, "deviceScaleFactor": 1, "mobile": True}
    tab.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    try:
        for address in ("", "#/matryoshka/3", "#/matryoshka/tree"):
            tab.open(address)
            assert tab.do("document.documentElement.scrollWidth") <= 360
    finally:
        tab.driver.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def test_pictures_are_of_the_page(driver, page, tmp_path, monkeypatch):
    monkeypatch.setattr(screenshots, "chromium", lambda: contextlib.nullcontext(driver))
    folder = page.removeprefix("file://").removesuffix("/index.html")
    flags = ["--page", folder, "--latent", f"matryoshka/{CHILD}", "--open", str(PARENT)]
    screenshots.main([*flags, "--to", str(tmp_path), "--height", "700"])
    for name in ("latent.png", "tree.png"):
        picture = matplotlib.image.imread(tmp_path / name)
        assert picture.shape[1] == 1100
        assert picture.shape[0] <= 700
        assert picture[..., :3].std() > 0.05, "something is drawn"
