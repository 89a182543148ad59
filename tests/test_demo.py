"""`gspn demo`: what the page computes, the page itself, and, marked slow, a visit with a browser."""

import io
import json
import socket
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import gspn
from gspn import demo, weights

SEVEN = Path(__file__).parents[1] / "docs/images/seven.png"
BROWSER = Path("/usr/bin/chromium")  # Debian's
PATIENCE = 120_000  # milliseconds


@pytest.fixture(scope="module")
def digits():
    return demo.subject("digits")


@pytest.fixture(scope="module")
def seven():
    return Image.open(SEVEN)


@pytest.mark.parametrize(("size", "factor"), [((8, 8), 56), ((100, 30), 4), ((300, 200), 1), ((1000, 2000), 1)])
def test_a_click_finds_the_pixel(size, factor):
    pixels = torch.zeros(3, *size, dtype=torch.uint8)
    picture = demo.enlarged(pixels)
    assert picture.size == (size[1] * factor, size[0] * factor)
    for row, column in ((0, 0), (size[0] - 1, size[1] - 1), (size[0] // 2, size[1] // 3)):
        for part in (0, factor - 1):
            assert demo.clicked(pixels, column * factor + part, row * factor + part) == (row, column)
    assert demo.clicked(pixels, *picture.size) == (size[0] - 1, size[1] - 1)  # the edge


@pytest.mark.parametrize("channels", [1, 3])
def test_the_mark_is_around_the_pixel(channels):
    pixels = torch.full((channels, 8, 8), 90, dtype=torch.uint8)
    marked = np.array(demo.enlarged(pixels, (2, 5))) != 90
    rows, columns = np.nonzero(marked.any(2))
    assert (rows.min(), rows.max(), columns.min(), columns.max()) == (2 * 56, 3 * 56 - 1, 5 * 56, 6 * 56 - 1)
    assert not marked[2 * 56 + 20 : 3 * 56 - 20, 5 * 56 + 20 : 6 * 56 - 20].any()  # the pixel itself stays visible


def test_a_classifier(digits, seven):
    assert isinstance(digits, demo.Classifying)
    answer = digits.answer(seven, 1)
    assert answer == pytest.approx(gspn.load_run("digits").predict(SEVEN)) and next(iter(answer)) == "7"
    assert digits.pixels(seven, 1).tolist() == [np.array(seven).tolist()]
    assert digits.pixels(seven, 2.5).shape == (1, 20, 20) and digits.pixels(seven, 0.01).shape == (1, 1, 1)
    assert len(digits.answer(seven.convert("RGBA").resize((50, 40)), 2)) == 10


def test_classes_of_one_name_are_an_error(seven):
    """As in Python: one of the two would stand for both."""
    shown = demo.subject("digits")
    shown.loaded.classes = ["a", "a", *shown.loaded.classes[2:]]
    with pytest.raises(ValueError, match=r"two classes of .* have the same name"):
        shown.answer(seven, 1)


def test_the_context_is_that_of_the_clicked_pixel(digits, seven, monkeypatch):
    asked = []
    original = demo.plots.context_maps

    def context_maps(model, image, place, *more):
        asked.append((place, more))
        return original(model, image, place, *more)

    monkeypatch.setattr(demo.plots, "context_maps", context_maps)
    pixels = digits.pixels(seven, 1)
    pictures = [np.array(digits.context(pixels, place)) for place in ((3, 4), (6, 1), None)]
    assert [place for place, _ in asked] == [(3, 4), (6, 1), (4, 4)]
    assert pictures[0].shape == pictures[1].shape and (pictures[0] != pictures[1]).any()
    with pytest.raises(ValueError, match="8, 0"):
        digits.context(pixels, (8, 0))


def test_a_segmenter(masked_run, masked):
    shown = demo.subject(masked_run.path)
    assert isinstance(shown, demo.Segmenting)
    image = Image.open(next(file for file in sorted(masked.rglob("*.png")) if "mask" not in str(file)))
    pixels = shown.pixels(image, 0.5)
    assert pixels.shape == (3, round(image.height / 2), round(image.width / 2))
    assert shown.answer(image, 1).height >= image.height
    assert (np.array(shown.context(pixels, (0, 0))) != np.array(shown.context(pixels, None))).any()
    with pytest.raises(ValueError, match="4,000,000"):
        shown.context(torch.zeros(3, 2001, 2000, dtype=torch.uint8), None)


def test_too_many_pixels_for_the_context_still_get_an_answer(masked_run, masked, monkeypatch):
    gradio = pytest.importorskip("gradio", reason='gradio is not installed: pip install "gspn[demo]"')
    told = []
    monkeypatch.setattr(demo, "MANY_PIXELS", 4)
    monkeypatch.setattr(gradio, "Warning", told.append)
    image = Image.open(next(file for file in sorted(masked.rglob("*.png")) if "mask" not in str(file)))
    page = demo.page(demo.subject(masked_run.path), "run")
    look = next(each.fn for each in page.fns.values() if each.name == "look")
    seen, answer, context = look(image, 1)
    assert seen is not None and answer is not None and context is None
    assert len(told) == 1 and "4 pixels" in told[0]

    def exhausted(self, pixels, place):
        raise RuntimeError("not enough memory")

    monkeypatch.setattr(demo.Segmenting, "context", exhausted)
    with pytest.raises(gradio.Error, match="not enough memory"):
        look(image, 1)


def test_a_generator(tmp_path):
    pytest.importorskip("diffusers")
    from helpers.diffusion import generator_run

    generator_run(tmp_path / "run")
    shown = demo.subject(tmp_path / "run")
    assert isinstance(shown, demo.Generating) and len(shown.classes) == shown.loaded.num_classes
    first, again, other = (shown.images(0, seed, 1, 2.0, 2) for seed in (0, 0, 1))
    assert len(first) == demo.AT_ONCE
    assert all(one.tobytes() == two.tobytes() for one, two in zip(first, again, strict=True))
    assert len({image.tobytes() for image in first + other}) == 2 * demo.AT_ONCE  # no image of one seed in another
    assert shown.images(0, 0, 2, 2.0, 2)[0].size == first[0].size


def test_pictures_to_pick(tmp_path):
    assert len(demo.pictures_of("digits", None)) == 12
    for name in ("b.PNG", "a.jpg", "notes.txt"):
        (tmp_path / name).touch()
    for name in ("._a.png", ".b.png"):
        (tmp_path / name).touch()
    (tmp_path / "folder.png").mkdir()
    assert [file.name for file in demo.pictures_of("digits", tmp_path)] == ["a.jpg", "b.PNG"]
    assert demo.pictures_of(tmp_path, None) == []


# -- the page --


@pytest.fixture
def this_machine_alone(monkeypatch):
    """No connection to another machine; the list of those that were tried."""
    tried = []

    def connect(original):
        def checked(self, address):
            if isinstance(address, tuple) and address[0] not in ("127.0.0.1", "localhost", "::1"):
                tried.append(address)
                raise OSError("only this machine")
            return original(self, address)

        return checked

    for name in ("connect", "connect_ex"):
        monkeypatch.setattr(socket.socket, name, connect(getattr(socket.socket, name)))
    return tried


@pytest.fixture
def serve(this_machine_alone):
    """Serves the page of a subject; returns its address."""
    pytest.importorskip("gradio", reason='gradio is not installed: pip install "gspn[demo]"')
    served = []

    def start(shown, name, pictures=()):
        served.append(demo.page(shown, name, pictures))
        return demo.launch(served[-1])

    yield start
    for blocks in served:
        blocks.close()


@pytest.fixture
def address(serve, digits):
    return serve(digits, "digits", demo.pictures_of("digits", None))


def test_the_page_is_served_to_this_machine_alone(address, this_machine_alone):
    from urllib.request import urlopen

    assert address.startswith("http://127.0.0.1:")
    page = urlopen(address).read().decode()
    config = json.loads(urlopen(f"{address}config").read())
    assert not this_machine_alone and not config["analytics_enabled"] and config["title"] == "gspn: digits"
    assert "fonts.googleapis" not in page and "fonts.googleapis" not in urlopen(f"{address}theme.css").read().decode()
    parts = {part["props"].get("elem_id"): part for part in config["components"]}
    assert {"picture", "seen", "answer", "context"} <= parts.keys()
    buttons = [part["props"].get("buttons") for part in config["components"] if part["type"] == "image"]
    assert all(each is not None and "share" not in each for each in buttons)


def test_the_command(monkeypatch, tmp_path):
    pytest.importorskip("gradio")
    from typer.testing import CliRunner

    from gspn.cli import app

    opened = []
    monkeypatch.setattr(demo, "launch", lambda blocks, port, browser: opened.append((blocks.title, port, browser)))
    monkeypatch.setattr("gradio.Blocks.block_thread", lambda self: None)
    assert CliRunner().invoke(app, ["demo"], catch_exceptions=False).exit_code == 0
    assert CliRunner().invoke(app, ["demo", "digits", "--port", "9000", "--no-browser"]).exit_code == 0
    assert opened == [("gspn: digits", None, True), ("gspn: digits", 9000, False)]
    result = CliRunner().invoke(app, ["demo", str(tmp_path / "nothing")])
    assert result.exit_code == 2 and "nothing" in result.stderr
    result = CliRunner().invoke(app, ["demo", "--images", str(tmp_path / "none")])
    assert result.exit_code == 2 and "none" in result.stderr
    result = CliRunner().invoke(app, ["demo", "--images", str(tmp_path)])
    assert result.exit_code == 2 and "no pictures" in result.stderr
    monkeypatch.setattr(weights, "find_spec", lambda name: None)
    result = CliRunner().invoke(app, ["demo"])
    assert result.exit_code == 2 and "pip install ./weights" in result.stderr


def test_a_port_in_use(monkeypatch):
    pytest.importorskip("gradio")
    from typer.testing import CliRunner

    from gspn.cli import app

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        result = CliRunner().invoke(app, ["demo", "--port", str(port), "--no-browser"])
    assert result.exit_code == 2 and str(port) in result.stderr


def test_without_gradio_the_extra_is_named(monkeypatch):
    import sys

    from typer.testing import CliRunner

    from gspn.cli import app

    monkeypatch.setitem(sys.modules, "gradio", None)
    result = CliRunner().invoke(app, ["demo"])
    assert result.exit_code == 2 and "gspn[demo]" in result.stderr


# -- a visit with a browser --


@pytest.fixture
def visit(this_machine_alone):
    """A tab of Debian's Chromium. Afterwards: nothing went wrong in it, and nothing was asked of other machines."""
    api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    if not BROWSER.exists():
        pytest.skip(f"there is no {BROWSER}")
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=str(BROWSER), args=["--no-sandbox"])
        tab, asked, wrong = browser.new_page(), [], []
        tab.set_default_timeout(PATIENCE)
        api.expect.set_options(PATIENCE)
        tab.on("request", lambda request: asked.append(request.url))
        tab.on("pageerror", lambda error: wrong.append(str(error)))
        yield tab
        browser.close()
    assert asked and not wrong and not this_machine_alone
    assert [url for url in asked if not url.startswith(("http://127.0.0.1:", "data:", "blob:"))] == []


def picture(tab, image):
    """The pixels of an image of the page."""
    return np.array(Image.open(io.BytesIO(tab.request.get(image.get_attribute("src")).body())).convert("RGB"))


def click_inside(image, x, y):
    """Clicks an image at a part of its width and height."""
    box = image.bounding_box()
    image.click(position={"x": box["width"] * x, "y": box["height"] * y})


@pytest.mark.slow
def test_a_picture_is_picked_classified_and_clicked(visit, address):
    from playwright.sync_api import expect

    visit.goto(address)
    visit.locator("#picked button").nth(9).click()  # a seven
    expect(visit.locator("#answer")).to_contain_text("7")
    seen, context = visit.locator("#seen img"), visit.locator("#context img")
    expect(context).to_be_visible()
    before, drawn = seen.get_attribute("src"), context.get_attribute("src")
    click_inside(seen, 1.5 / 8, 6.5 / 8)
    expect(context).not_to_have_attribute("src", drawn)
    expect(seen).not_to_have_attribute("src", before)
    mark = np.argwhere((picture(visit, seen) == (53, 224, 255)).all(2))
    assert mark.min(0).tolist() == [6 * 56, 56] and mark.max(0).tolist() == [7 * 56 - 1, 2 * 56 - 1]
    before = seen.get_attribute("src")
    slider = visit.locator("input[type=number]").first
    slider.fill("2")
    slider.press("Enter")
    slider.blur()
    expect(seen).not_to_have_attribute("src", before)
    assert picture(visit, seen).shape == (16 * 28, 16 * 28, 3)


@pytest.mark.slow
def test_a_picture_is_uploaded_segmented_and_clicked(visit, serve, masked_run, masked):
    from playwright.sync_api import expect

    image = next(file for file in sorted(masked.rglob("*.png")) if "mask" not in str(file))
    visit.goto(serve(demo.subject(masked_run.path), "shapes"))
    visit.locator("#picture input[type=file]").set_input_files(image)
    seen, context = visit.locator("#seen img"), visit.locator("#context img")
    expect(visit.locator("#answer img")).to_be_visible()
    expect(context).to_be_visible()
    drawn = context.get_attribute("src")
    click_inside(seen, 0.2, 0.3)
    expect(context).not_to_have_attribute("src", drawn)


@pytest.mark.slow
def test_pictures_of_a_class_are_made(visit, serve):
    pytest.importorskip("diffusers")
    from playwright.sync_api import expect

    visit.goto(serve(demo.subject("digits-generator"), "digits-generator"))
    visit.locator("#class input").fill("3")
    visit.locator("#class input").press("Enter")
    visit.locator("#make").click()
    made = visit.locator("#made .grid-container img, #made .thumbnail-item img")
    expect(made.first).to_be_visible()
    assert made.count() == demo.AT_ONCE
    shown = Image.fromarray(picture(visit, made.first)).resize((8, 8), Image.Resampling.NEAREST)
    assert next(iter(gspn.load_run("digits").predict(shown))) == "3"
