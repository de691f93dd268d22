"""The page of ``conam demo``, driven in a real browser, and its Space."""

import importlib.util
import json
import os
import re
import runpy
import shutil
import socket
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import timm
from conftest import CHECKOUT
from huggingface_hub import SpaceCard
from packaging.requirements import Requirement
from PIL import Image

from conam_zoo.deploy.demo import _results, _shown_part, build_page, look
from conam_zoo.errors import UserError
from conam_zoo.models.registry import open_model
from conam_zoo.visualize.predict import percent, predict

PHOTOS = CHECKOUT / "examples" / "photos"
ODD_CLASS = "<img src=x onerror=\"document.title='run'\"> ${document.title} {{value}}"
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)

browser_test = pytest.mark.browser


@pytest.fixture(scope="module")
def needed() -> None:
    """Skip without what the page and its test need, or fail if ``CONAM_BROWSER=1``."""
    missing = [name for name in ("gradio", "playwright") if importlib.util.find_spec(name) is None]
    if missing := missing + ["Chromium"] * (CHROMIUM is None):
        stop = pytest.fail if os.environ.get("CONAM_BROWSER") == "1" else pytest.skip
        stop(f"{', '.join(missing)} not there: pip install -e '.[demo]' playwright; apt-get install chromium")


@pytest.fixture(scope="module")
def odd_net(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A net of one's own whose folder and first class look like markup."""
    folder = tmp_path_factory.mktemp("nets") / "a <b>net"
    shutil.copytree(CHECKOUT / "weights" / "resnet20_conam.cifar10", folder)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config["label_names"][config["label_names"].index("bird")] = ODD_CLASS
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return f"local-dir:{folder}"


def test_a_narrow_strip_is_not_enlarged_as_a_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Image.new("RGB", (1000, 1)).save(tmp_path / "strip.png")
    pixels: list[int] = []
    resize = Image.Image.resize

    def counted(self, size, *arguments, **options):
        pixels.append(size[0] * size[1])
        return resize(self, size, *arguments, **options)

    monkeypatch.setattr(Image.Image, "resize", counted)
    assert "The net sees 32 x 32 pixels" in _results(
        tmp_path / "strip.png", {"net": open_model("resnet20_conam.cifar10")}, 0
    )
    assert 384 * 384 in pixels
    assert max(pixels) <= 1000 * 32 * 32


@pytest.mark.parametrize(
    ("overlay", "size"),
    [
        ({}, (100, 100)),
        ({"crop_mode": "squash"}, (200, 100)),
        ({"crop_mode": "border"}, (200, 100)),
        ({"input_size": (3, 32, 64)}, (200, 100)),
        ({"input_size": (3, 64, 32)}, (50, 100)),
    ],
)
def test_a_map_lies_over_the_part_of_the_picture_that_the_net_sees(overlay: dict, size: tuple[int, int]) -> None:
    net = timm.create_model("resnet20_conam.cifar10", device="meta", pretrained_cfg_overlay=overlay)
    assert _shown_part(Image.new("RGB", (200, 100)), net).size == size


@pytest.fixture(scope="module")
def address(needed: None, odd_net: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A running ``conam demo`` that can reach nothing but this machine."""
    folder = tmp_path_factory.mktemp("server")
    (folder / "guard").mkdir()
    (folder / "guard" / "sitecustomize.py").write_text(
        "import pytest_socket\npytest_socket.socket_allow_hosts(['127.0.0.1', 'localhost'], allow_unix_socket=True)\n"
    )
    paths = [str(folder / "guard"), str(CHECKOUT), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths)), "TMPDIR": str(folder)}
    (folder / "work").mkdir()
    with open(folder / "err", "wb") as errors:
        server = subprocess.Popen(
            [sys.executable, "-m", "conam_zoo", "demo", odd_net],
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            env=environment,
            cwd=folder / "work",
        )
        try:
            assert server.stdout is not None
            line = server.stdout.readline()
            found = re.search(r"http://127\.0\.0\.1:\d+/", line)
            assert found, line + (folder / "err").read_text()
            yield found[0]
        finally:
            server.terminate()
            code = server.wait(60)
    assert (code, (folder / "err").read_text()) == (0, "")
    assert not list((folder / "work").iterdir())
    assert not list(folder.glob("conam-demo-*"))


@pytest.fixture(scope="module")
def chromium(needed: None) -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    arguments = ["--no-sandbox", "--use-fake-device-for-media-stream", "--use-fake-ui-for-media-stream"]
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=arguments)
        yield browser
        browser.close()


@pytest.fixture
def page(chromium: Any, address: str) -> Iterator[Any]:
    """The page in a window of its own, once it shows the first photograph; it may ask nobody but its server."""
    context = chromium.new_context(
        viewport={"width": 1280, "height": 900}, permissions=["clipboard-read", "clipboard-write"]
    )
    page = context.new_page()
    page.set_default_timeout(60_000)
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    page.on("websocket", lambda socket: asked.append(socket.url))
    page.goto(address)
    page.locator("article").wait_for()
    yield page
    elsewhere = [url for url in asked if not url.startswith((address, "data:", "blob:"))]
    assert not elsewhere
    assert page.title() == "conam_zoo"
    context.close()


def bars(page: Any, net: int = 0) -> list[tuple[str, ...]]:
    """What a net says: classes and probabilities as they are written."""
    rows = page.locator("article").nth(net).locator("li")
    return [tuple(row.locator("span").all_inner_texts()) for row in rows.all()]


def choose(page: Any, label: str, option: str) -> None:
    box = page.get_by_label(label, exact=True)
    box.click()
    own = page.locator(f"#{box.get_attribute('aria-controls')}")  # the list of another box may still be fading out
    own.get_by_role("option", name=option, exact=True).click()


def upload(page: Any, path: Path) -> None:
    page.locator("input[type=file]").first.set_input_files(path)


def expect(page: Any, text: str) -> None:
    page.get_by_text(text).first.wait_for()


@browser_test
def test_it_begins_with_a_photograph_and_the_net_that_was_named(page: Any, odd_net: str) -> None:
    assert page.locator("article h2").inner_text() == odd_net
    shown = [name for name, _ in bars(page)]
    assert (len(shown), shown[0]) == (5, ODD_CLASS.replace("_", " "))
    assert len(page.locator("article svg text").all()) == 16
    assert len(page.get_by_role("button").filter(has=page.locator("img")).all()) == len(list(PHOTOS.glob("*.jpg")))


@browser_test
@pytest.mark.parametrize("mode", ["RGB", "P", "L"])
def test_an_uploaded_picture_is_classified_as_by_the_command(page: Any, mode: str, tmp_path: Path) -> None:
    image = Image.open(PHOTOS / "truck.jpg")
    if mode == "P":
        image = image.quantize(64)
        image.info["transparency"] = 3
    path = tmp_path / f"a picture.{'jpg' if mode == 'RGB' else 'png'}"
    image.convert(mode).save(path)
    choose(page, "Net", "densenet40_12_conam.cifar10")
    upload(page, path)
    (prediction,) = predict(open_model("densenet40_12_conam.cifar10"), [path])
    page.locator("article li:first-of-type", has_text="truck").wait_for()
    assert bars(page) == [(name, percent(share)) for name, share in prediction.top]


@browser_test
def test_nets_are_switched_and_compared_and_maps_switched_and_faded(page: Any) -> None:
    choose(page, "Net", "wide_resnet16_4_conam.cifar10")
    choose(page, "Compare with", "resnet56_conam.cifar10")
    page.locator("article").nth(1).wait_for()
    assert page.locator("article h2").all_inner_texts() == ["wide_resnet16_4_conam.cifar10", "resnet56_conam.cifar10"]
    first, second = (page.locator("article").nth(net).bounding_box() for net in (0, 1))
    assert first["y"] == second["y"]
    assert first["x"] + first["width"] <= second["x"]
    page.get_by_label("layer1.0").check()
    expect(page, "Confidence of layer1.0 in percent; nearly the same everywhere")
    overlay = page.locator("article svg g").first
    assert overlay.evaluate("e => getComputedStyle(e).opacity") == "0.6"
    slider = page.get_by_label("range slider for Overlay")
    slider.fill("0.25")
    assert overlay.evaluate("e => getComputedStyle(e).opacity") == "0.25"
    page.get_by_label("none", exact=True).check()
    page.locator("article svg").first.wait_for(state="detached")
    choose(page, "Compare with", "nothing")
    choose(page, "Net", "densenet40_12_conam.cifar10")
    page.get_by_label("block2").check()
    expect(page, "Confidence of block2")
    assert page.locator("article").count() == 1


@browser_test
def test_a_picture_is_photographed_and_pasted(page: Any) -> None:
    page.get_by_label("Capture from camera").click()
    page.get_by_text("Click to Access Webcam").click()
    expect(page, "Choose a picture")
    page.wait_for_function("document.querySelector('video')?.videoWidth > 0")  # else it takes a picture of nothing
    page.get_by_label("capture photo").click()
    page.locator("article").wait_for()
    assert len(bars(page)) == 5
    page.evaluate(
        """async (address) => {
            const photo = await createImageBitmap(await (await fetch(address)).blob())
            const canvas = Object.assign(document.createElement("canvas"), {width: photo.width, height: photo.height})
            canvas.getContext("2d").drawImage(photo, 0, 0)
            const png = await new Promise(done => canvas.toBlob(done))
            await navigator.clipboard.write([new ClipboardItem({"image/png": png})])
        }""",
        page.locator("button img").last.get_attribute("src"),
    )
    page.get_by_label("Paste from clipboard").click()
    page.locator("article li:first-of-type", has_text="truck").wait_for()


@browser_test
def test_what_cannot_be_read_is_told_and_the_next_picture_works(page: Any, tmp_path: Path) -> None:
    broken = tmp_path / "half.jpg"
    broken.write_bytes((PHOTOS / "cat.jpg").read_bytes()[:2000])
    upload(page, broken)
    sentence = page.get_by_role("alert")
    sentence.wait_for()
    assert re.fullmatch(r"The image half\.jpg is damaged or too large \(.*\): replace it\.", sentence.inner_text())
    upload(page, PHOTOS / "cat.jpg")
    page.locator("article").wait_for()
    assert sentence.count() == 0


@browser_test
def test_nothing_is_wider_than_a_phone(page: Any, tmp_path: Path) -> None:
    page.set_viewport_size({"width": 390, "height": 844})
    width = "() => Math.max(...[...document.querySelectorAll('body *')].map(e => e.getBoundingClientRect().right))"
    choose(page, "Compare with", "wide_resnet16_4_conam.cifar10")
    page.locator("article").nth(1).wait_for()
    assert page.evaluate("document.documentElement.scrollWidth") == 390
    assert page.evaluate(width) <= 390
    (tmp_path / f"{'long' * 40}.png").write_bytes(b"no picture")
    upload(page, tmp_path / f"{'long' * 40}.png")
    page.get_by_role("alert").wait_for()
    assert page.evaluate("document.documentElement.scrollWidth") == 390


@browser_test
def test_the_space_opens_only_what_was_uploaded_in_nets_that_it_offers(
    needed: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import httpx

    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path / "uploaded"))
    (tmp_path / "private.jpg").write_bytes((PHOTOS / "cat.jpg").read_bytes())
    page = runpy.run_path(str(CHECKOUT / "examples" / "space" / "app.py"))["page"]
    event = next(number for number, each in page.fns.items() if len(each.inputs) == 4)
    _, url, _ = page.launch(prevent_thread_lock=True, quiet=True, **look())
    with httpx.Client(base_url=url, timeout=60, trust_env=False) as client:

        def ask(path: str, net: str) -> str:
            file = {"path": path, "meta": {"_type": "gradio.FileData"}}
            body = {"fn_index": event, "data": [file, net, "nothing", 0]}
            return client.post("/gradio_api/run/predict", json=body).text

        files = {"files": ("cat.jpg", (PHOTOS / "cat.jpg").read_bytes())}
        (uploaded,) = client.post("/gradio_api/upload", files=files).json()
        own = f"local-dir:{CHECKOUT / 'weights' / 'resnet20_conam.cifar10'}"
        assert "<article>" in ask(uploaded, "resnet20_conam.cifar10")
        assert "<article>" not in ask(str(tmp_path / "private.jpg"), "resnet20_conam.cifar10")
        assert "not in the list of choices" in ask(uploaded, own)
    page.close(verbose=False)


def test_the_space_has_the_header_and_the_packages_that_the_hub_needs() -> None:
    space = CHECKOUT / "examples" / "space"
    card = SpaceCard.load(space / "README.md").data
    assert card.sdk == "gradio"
    assert (space / card.app_file).is_file()
    with (CHECKOUT / "pyproject.toml").open("rb") as file:
        (gradio,) = tomllib.load(file)["project"]["optional-dependencies"]["demo"]
    assert Requirement(gradio).specifier.contains(card.sdk_version)
    wanted = Requirement((space / "requirements.txt").read_text().strip())
    assert (wanted.name, wanted.extras) == ("conam-zoo", {"demo"})


def test_without_gradio_it_is_one_sentence(conam: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gradio", None)
    code, out, err = conam("demo")
    assert (code, out, err) == (2, "", "conam: The page needs gradio: pip install 'gradio>=6.31'.\n")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    monkeypatch.setattr("conam_zoo.deploy.demo.version", lambda name: "6.9.1")
    with pytest.raises(UserError, match=r"pip install 'gradio>=6\.31'"):
        build_page()


def test_an_address_that_cannot_be_served_is_one_sentence(conam: Any) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        for at, options in ((f"127.0.0.1, port {port}", ("--port", port)), ("192.0.2.1", ("--host", "192.0.2.1"))):
            code, out, err = conam("demo", *options)
            assert (code, out, err.count("\n")) == (2, "", 1)
            assert f"cannot be served at {at} (" in err
