"""The web page in a real browser: a recording is the microphone, a recogniser hears the sound."""

import base64
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import numpy as np
import pytest

from sa2jax.audio import load_audio, resample, write_wav

pytest.importorskip("fastapi", reason="needs the extra [serve]")
from helpers.servers import run_app

from sa2jax.serve.app import create_app
from sa2jax.serve.settings import Settings

# Keeps what goes to the speaker.
TAP = """
const make = AudioContext.prototype.createGain;
AudioContext.prototype.createGain = function () {
  const gain = make.call(this), tap = this.createScriptProcessor(4096, 1, 1);
  window.tapped = [];
  tap.onaudioprocess = (event) => window.tapped.push(...event.inputBuffer.getChannelData(0));
  gain.connect(tap);
  tap.connect(this.destination);
  return gain;
};
"""
TAPPED = """
const bytes = new Uint8Array(Int16Array.from(window.tapped, (x) => 32767 * x).buffer);
return btoa(Array.from(bytes, (x) => String.fromCharCode(x)).join(""));
"""


@pytest.fixture(scope="module")
def url(nano, tmp_path_factory) -> Iterator[str]:
    settings = Settings(model_id="nano", rows=2, voices=tmp_path_factory.mktemp("voices"))
    app = create_app(nano, settings, warm=False)
    with run_app(app) as port:
        yield f"http://127.0.0.1:{port}"


def test_the_files_of_the_page(url):
    page = httpx.get(f"{url}/")
    assert page.headers["content-type"].startswith("text/html")
    assert "default-src 'self'" in page.headers["content-security-policy"]
    for name in ("page.css", "page.js", "player.js", "session.js", "microphone.js"):
        assert httpx.get(f"{url}/page/{name}").status_code == 200
    for name in ("routes.py", "..%2froutes.py", "%2e%2e/app.py"):
        assert httpx.get(f"{url}/page/{name}").status_code == 404


class Page:
    """The page, open in a browser."""

    def __init__(self, driver, url: str):
        self.driver = driver
        driver.execute_cdp_cmd("Page.addScriptToEvaluateOnNewDocument", {"source": TAP})
        driver.get(url)
        self.wait(lambda: self.run("return document.querySelectorAll('#voice option').length > 0"))

    def run(self, script: str):
        return self.driver.execute_script(script)

    def text(self, selector: str) -> str:
        return self.run(f"return document.querySelector({selector!r})?.textContent ?? ''")

    def wait(self, true: Callable[[], object], seconds: float = 60) -> None:
        end = time.monotonic() + seconds
        while not true():
            assert time.monotonic() < end, self.text("body")
            time.sleep(0.05)

    def write(self, text: str) -> None:
        self.run(
            f"document.querySelector('#text').value = {text!r};"
            "document.querySelector('#write').requestSubmit()"
        )

    @property
    def played(self) -> np.ndarray:
        return np.frombuffer(base64.b64decode(self.run(TAPPED)), "<i2").astype(np.float32) / 32768


@pytest.fixture
def page(url, question, tmp_path: Path) -> Iterator[Page]:
    webdriver = pytest.importorskip("selenium.webdriver", reason="needs selenium")
    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if chromium is None or driver is None:
        pytest.skip("needs chromium and chromium-driver")
    spoken = resample(load_audio(question), 16_000, 48_000)
    quiet = np.zeros(48_000, np.float32)
    write_wav(tmp_path / "microphone.wav", np.concatenate([quiet, spoken, *[quiet] * 30]), 48_000)
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for argument in (
        "headless=new",
        "no-sandbox",
        "disable-gpu",
        "disable-dev-shm-usage",
        "use-fake-ui-for-media-stream",
        "use-fake-device-for-media-stream",
        f"use-file-for-fake-audio-capture={tmp_path / 'microphone.wav'}%noloop",
        "autoplay-policy=no-user-gesture-required",
        "window-size=390,844",
    ):
        options.add_argument(f"--{argument}")
    service = webdriver.ChromeService(driver)
    browser = webdriver.Chrome(options=options, service=service)
    try:
        yield Page(browser, url)
    finally:
        browser.quit()


def sound_in(wave: np.ndarray) -> np.ndarray:
    """What can be heard of it, and 0.3 s around that."""
    first, *_, last = np.flatnonzero(np.abs(wave) > 0.02)
    return wave[max(first - 7200, 0) : last + 7200]


@pytest.mark.slow
def test_a_spoken_question_to_the_page(page, nano):
    page.run("document.querySelector('#start').click()")
    page.wait(lambda: "seven" in page.text("#talk .assistant"))
    page.wait(lambda: page.text("#talk .user") not in ("", "…"))
    assert "three" in page.text("#talk .user")
    page.wait(lambda: page.text("#first-sound").endswith(" ms"))
    page.wait(lambda: page.run("return document.querySelector('#interrupt').disabled"))
    assert "seven" in nano.transcribe((sound_in(page.played), 24_000))
    # It fits a phone.
    assert page.run("return document.documentElement.scrollWidth <= window.innerWidth")


@pytest.mark.slow
def test_written_and_interrupted_by_keyboard(page):
    from selenium.webdriver import ActionChains, Keys

    page.write("what is three plus four")
    page.wait(lambda: not page.run("return document.querySelector('#interrupt').disabled"))
    ActionChains(page.driver).send_keys(Keys.ESCAPE).perform()
    page.wait(lambda: page.run("return document.querySelectorAll('#talk .cut').length === 1"))
    page.write("what is two plus two")
    page.wait(lambda: page.run("return document.querySelectorAll('#talk .assistant').length === 2"))
    assert page.run("return document.querySelectorAll('#talk .note').length") <= 1


@pytest.mark.slow
def test_tools_and_voices(page):
    page.run(
        "const tools = document.querySelector('#tools'); tools.checked = true;"
        "const voice = document.querySelector('#voice'); voice.value = 'anna';"
        "voice.dispatchEvent(new Event('change', { bubbles: true }))"
    )
    page.write("what time is it")
    page.wait(lambda: "get_date_time()" in page.text("#talk"))
    page.wait(lambda: page.text("#talk .assistant"))
