"""Takes pictures of a page of latents in headless Chromium: of a latent's view, and of a tree.

    python browse.py --run runs/standin/sampled_seed0 --cache cache/standin/validation --out page
    python -m studies.screenshots --page page --latent matryoshka/11 --open 11 13 17

It needs Chromium, its driver chromedriver, and the Python package selenium.
"""

import base64
import contextlib
import dataclasses
import shutil
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from matryoshka.command_line import main_guard, parse, require_positive, setting
from matryoshka.errors import UserError
from matryoshka.files import make_folder, write_atomically

CHROMIUM = ("chromium", "chromium-browser", "google-chrome")  # the first one on the PATH is used
FLAGS = (
    *("--headless=new", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-sync"),
    *("--disable-background-networking", "--disable-component-update", "--window-size=1200,900"),
)
SECONDS = 30  # how long to wait for a view


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Which page and latents, and the size of the pictures."""

    page: str = setting(help="folder that browse.py wrote")
    latent: str = setting("matryoshka/11", "which latent: SAE/NUMBER")
    open: tuple[int, ...] = setting((), "latents that are open in the tree; default: none")
    to: str = setting("results/standin", "folder for latent.png and tree.png")
    width: int = setting(1100, "width of the pictures, in pixels")
    height: int = setting(1500, "largest height of the pictures, in pixels")
    theme: str = setting("light", "the page's theme", choices=("light", "dark"))


def why_not() -> str | None:
    """Says what is missing to start a browser; None if nothing is."""
    try:
        import selenium.webdriver  # noqa: F401
    except ImportError:
        return "the Python package selenium is not installed"
    if not any(map(shutil.which, CHROMIUM)):
        return "there is no chromium on the PATH"
    return None if shutil.which("chromedriver") else "there is no chromedriver on the PATH"


@contextlib.contextmanager
def chromium() -> Iterator[Any]:
    """A context with Selenium's driver of a new headless Chromium with an empty profile.

    Raises `UserError` if it cannot be started.
    """
    missing = why_not()
    if missing:
        raise UserError(f"no browser can be started: {missing}")
    from selenium import webdriver

    with tempfile.TemporaryDirectory() as user:
        options = webdriver.ChromeOptions()
        options.binary_location = next(filter(None, map(shutil.which, CHROMIUM)))
        for flag in (*FLAGS, f"--user-data-dir={user}"):
            options.add_argument(flag)
        options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
        service = webdriver.ChromeService(shutil.which("chromedriver"))
        driver = webdriver.Chrome(options=options, service=service)
        try:
            yield driver
        finally:
            driver.quit()


def show(driver: Any, page: str, address: str) -> None:
    """Reloads the page at an address, and waits until its view is shown. Raises `UserError`."""
    driver.get("about:blank")
    driver.get(page + address)
    end = time.monotonic() + SECONDS
    while not driver.execute_script(
        "return document.getElementById('main')?.dataset.shown === location.hash"
    ):
        if time.monotonic() > end:
            raise UserError(f"{page}{address} shows nothing within {SECONDS} s")
        time.sleep(0.02)


def picture(driver: Any, config: Config, path: Path) -> None:
    """Writes a PNG of the view, as high as the view, but at most `config.height`."""
    size = {"width": config.width, "deviceScaleFactor": 1, "mobile": False}
    media = {"features": [{"name": "prefers-color-scheme", "value": config.theme}]}
    driver.execute_cdp_cmd("Emulation.setEmulatedMedia", media)
    driver.execute_script("setTheme(arguments[0], false); scrollTo(0, 0)", config.theme)
    driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size | {"height": 900})
    end = driver.execute_script(
        "return document.querySelector('main').getBoundingClientRect().bottom"
    )
    height = min(config.height, int(end) + 16)
    driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size | {"height": height})
    data = driver.execute_cdp_cmd("Page.captureScreenshot", {"format": "png"})["data"]
    write_atomically(path, lambda part: part.write_bytes(base64.b64decode(data)))


def run(config: Config) -> list[Path]:
    """Writes the two pictures; returns their paths. Raises `UserError`."""
    require_positive(config, "width", "height")
    index = Path(config.page) / "index.html"
    if not index.is_file():
        raise UserError(f"--page {config.page} holds no index.html: write it with browse.py")
    out = Path(config.to)
    make_folder(out, "--to")
    sae = config.latent.split("/")[0]
    opened = ",".join(map(str, config.open))
    views = {"latent.png": f"#/{config.latent}", "tree.png": f"#/{sae}/tree?open={opened}"}
    with chromium() as driver:
        for name, address in views.items():
            show(driver, index.resolve().as_uri(), address)
            picture(driver, config, out / name)
    return [out / name for name in views]


def main(argv: Sequence[str] | None = None) -> None:
    with main_guard():
        for path in run(parse(Config, __doc__ or "", argv)):
            print(path)


if __name__ == "__main__":
    main()
