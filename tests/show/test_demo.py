"""`selector demo`: what stands behind the button, and the page itself in a browser of two widths."""

from __future__ import annotations

import re
import shutil
import sys
from types import SimpleNamespace

import pytest

from selector import Budget, load_selector
from selector.cli import main
from selector.errors import UsageError
from selector.measure.answering import answer, prepare
from selector.measure.evidence import model_canvas
from selector.plug import select_tokens
from selector.show import gallery
from selector.show.demo import Card, Demo, example, opened, page
from selector.show.gallery import kept_picture

SELECTORS = {"svd": "svd-prune:rank=2", "random": "random", "attention": "cls-attention"}


@pytest.fixture
def photo(make_image, tmp_path):
    path = tmp_path / "photo.png"
    make_image(48, 64).save(path)
    return str(path)


@pytest.fixture
def make_demo(tiny_model):
    def build(vision="clip", **more):
        selectors = {label: load_selector(spec).eval() for label, spec in SELECTORS.items()}
        return Demo(*tiny_model(vision), selectors, Budget(1, **more), max_new_tokens=4)

    return build


def test_each_card_is_what_the_plug_gives(make_demo, photo):
    demo = make_demo()
    whole, svd, random = demo.cards(photo, "what is this?", 12, ["svd", "random"])
    model, processor = demo.model, demo.processor
    inputs = prepare(processor, opened(photo), "what is this?", model.device)

    full = answer(model, processor, inputs, 4).text
    assert (whole.title, whole.seen.answer, whole.same) == ("every token", full, None)
    assert whole.seen.measured == whole.seen.full == demo.count(opened(photo))
    for card, label in ((svd, "svd"), (random, "random")):
        with select_tokens(model, demo.selectors[label], 12) as log:
            text = answer(model, processor, inputs, 4).text
        assert (card.title, card.seen.answer, card.seen.measured) == (label, text, log.measured[0])
        assert card.same == (text == full)
        assert card.note == ""
    assert any(a.tobytes() != b.tobytes() for a, b in zip(svd.pictures, random.pictures, strict=True))


def test_one_encoding_serves_every_budget_and_selector(make_demo, photo, monkeypatch):
    demo, calls, encode = make_demo(), [], gallery.encode

    def counted(*args):
        calls.append(args)
        return encode(*args)

    monkeypatch.setattr(gallery, "encode", counted)
    for keep in (4, 8, 12):
        list(demo.cards(photo, "what is this?", keep, ["svd", "random"]))
    assert len(calls) == 1
    list(demo.cards(photo, "and this?", 12, ["svd"]))
    assert len(calls) == 2  # a selector may read the question


def test_a_selector_that_the_model_cannot_serve_spoils_its_own_card_only(make_demo, photo):
    cards = list(make_demo("siglip").cards(photo, "what?", 12, ["svd", "attention", "random"]))
    assert [card.seen is None for card in cards] == [False, False, True, False]
    assert "cls_attention" in cards[2].note
    assert "cls_attention" in page(cards)


def test_what_leaves_inside_the_language_model_is_shown_too(make_demo, photo):
    demo = make_demo()
    demo.selectors["inside"] = load_selector("inside:selector=norm,layer=1").eval()
    inputs = prepare(demo.processor, opened(photo), "what?", demo.model.device)
    with select_tokens(demo.model, demo.selectors["inside"], 24) as log:
        text = answer(demo.model, demo.processor, inputs, 4).text

    _, card = demo.cards(photo, "what?", 24, ["inside"])
    assert (card.seen.answer, card.seen.measured) == (text, log.measured[0])
    assert 0 < card.seen.kept.sum() < demo.count(opened(photo))
    with pytest.raises(UsageError, match="ask a question"):
        kept_picture(demo.model, demo.processor, opened(photo), {"inside": demo.selectors["inside"]}, 24)


def test_scope_and_newlines_hold_for_every_budget(make_demo, photo):
    seen = [next(c for c in make_demo(newlines=n).cards(photo, "?", 12, ["svd"]) if c.same is not None).seen
            for n in ("kept_rows", "none")]  # fmt: skip
    assert [each.measured for each in seen] == [12, 12]
    assert seen[0].kept.sum() < seen[1].kept.sum()  # newline tokens take their part of the twelve


@pytest.mark.parametrize(
    ("path", "question", "keep", "words"),
    [
        (None, "what?", 9, "there is no image"),
        ("photo", " ", 9, "there is no question"),
        ("photo", "<image>?", 9, "must not hold <image>"),
        ("broken", "what?", 9, "cannot be read"),
        ("photo", "what?", 0, "keep"),
    ],
)
def test_mistakes_are_messages(make_demo, photo, tmp_path, path, question, keep, words):
    (tmp_path / "broken.png").write_bytes(b"no image")
    path = path and photo.replace("photo", path)
    with pytest.raises(UsageError, match=words):
        list(make_demo().cards(path, question, keep, ["svd"]))


def test_the_page_escapes_what_was_typed_and_answered(make_demo, photo):
    cards = list(make_demo().cards(photo, "what?", 9, ["svd"]))
    bad = "<script>x</script>"
    html = page([Card(bad, cards[1].seen, cards[1].pictures, False, bad)], bad)
    assert "<script>" not in html
    assert html.count("&lt;script&gt;") == 5  # error, title, two alternative texts, note
    assert "another answer" in html
    assert len(re.findall(r'src="data:image/png;base64,', html)) == 2


def test_pictures_are_those_of_the_gallery_without_words(make_demo, photo):
    whole = next(iter(make_demo().cards(photo, "what?", 9, [])))
    main, base = whole.pictures
    assert max(main.size) == 340
    assert base.size == (96, 96)
    assert main.getpixel((main.width // 3, main.height // 3)) != (255, 255, 255)


def test_a_model_without_known_places_answers_without_a_picture(make_demo, photo, monkeypatch):
    odd = SimpleNamespace(model_type="odd")
    monkeypatch.setattr(gallery, "model_canvas", lambda config, *image: model_canvas(odd, *image))
    whole, svd = make_demo().cards(photo, "what?", 9, ["svd"])
    assert (svd.pictures, whole.pictures) == (None, None)
    assert "the adapter of 'odd' models does not say where" in svd.note
    assert svd.seen.answer is not None
    assert "<img" not in page([whole, svd])


def test_examples_differ():
    images = [example(number).image.tobytes() for number in range(4)]
    assert len(set(images)) == 4
    assert example(0, seed=5).image.tobytes() not in images


def test_without_gradio_the_error_names_the_extra(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "gradio", None)
    assert main(["demo"]) == 2
    assert "visual-token-selector[demo]" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--keep", "0.5", "9"], "one count or share"),
        (["--keep", "energy:0.9"], "one count or share"),
        (["--port", "70000"], "port must be in 0..65535"),
        (["--max-new-tokens", "0"], "max_new_tokens"),
    ],
)
def test_settings_are_checked_first(flags, words, capsys):
    assert main(["demo", *flags]) == 2
    assert words in capsys.readouterr().err


@pytest.fixture
def browser():
    driver = pytest.importorskip("playwright.sync_api", reason="the page is looked at through playwright")
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("no chromium, chromium-browser or google-chrome on the path")
    with driver.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def address(make_demo, tmp_path, monkeypatch):
    pytest.importorskip("gradio", reason="the page is made with gradio (the extra [demo])")
    from selector.show import interface

    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path / "dropped"))
    blocks = interface.build(make_demo("siglip"), "a tiny model", 0.25)
    yield interface.serve(blocks, port=0)
    blocks.close()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*unclosed file:ResourceWarning")  # gradio's, of what is dropped
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("width", [390, 1280])
def test_the_page_in_a_browser(browser, address, photo, width):
    """Asked on load, with another budget, without a question, about another image; nothing comes from elsewhere."""
    tab, fetched, wrong = browser.new_page(viewport={"width": width, "height": 900}), [], []
    tab.on("request", lambda request: fetched.append(request.url))
    tab.on("pageerror", lambda error: wrong.append(str(error)))
    tab.set_default_timeout(60_000)

    tab.goto(address)
    tab.wait_for_function("document.querySelectorAll('.card').length === 4")
    cards = tab.locator(".card").all_inner_texts()
    assert [text.split("\n")[0] for text in cards] == ["every token", *SELECTORS]
    assert "cls_attention" in cards[3]
    full = int(re.search(r"of (\d+) visual", cards[0])[1])
    assert f"{round(full / 4)} of {full}" in cards[1]
    assert tab.evaluate("document.documentElement.scrollWidth") <= width
    assert tab.evaluate("[...document.querySelectorAll('.card img')].every((i) => i.complete && i.naturalWidth > 90)")

    # Beside each other on a wide page, below each other on a narrow one.
    first, second = (tab.locator(".card").nth(i).bounding_box() for i in (0, 1))
    assert (second["y"] > first["y"] + first["height"]) == (width == 390)
    assert (second["x"] > first["x"] + first["width"]) == (width == 1280)

    tab.fill("#keep input[type=number]", "9")
    tab.click("#ask")
    tab.wait_for_function("document.querySelectorAll('.card')[2]?.innerText.includes('9 of ')")

    tab.fill("#question textarea", "")
    tab.click("#ask")
    tab.wait_for_selector("[role=alert]")
    assert "there is no question" in tab.inner_text("[role=alert]")

    tab.set_input_files("#image input[type=file]", photo)
    tab.fill("#question textarea", "what is this?")
    tab.wait_for_function(f"document.querySelector('#keep input[type=number]').max !== '{full}'")
    tab.click("#ask")
    tab.wait_for_function("document.querySelectorAll('.card').length === 4")
    assert f"of {full} " not in tab.inner_text(".card")

    assert wrong == []
    assert [url for url in fetched if not url.startswith((address, "data:", "blob:"))] == []
