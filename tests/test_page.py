"""The page of a text: what it stores, that no text can run code in it, and what it does in a browser."""

import copy
import dataclasses
import html
import json
import math
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch

import sample
import train
from mod import GPT, GPTConfig
from mode import MoDE, MoDEConfig
from support import checkpoint
from support import page as page_module
from support.data import CharTokenizer
from support.options import UserError
from support.page import page

try:
    from selenium import webdriver
    from selenium.webdriver import ActionChains, Keys
except ImportError:
    webdriver = None

NASTY = [
    "</script><script>window.hacked = 1</script>", "<img src=x onerror=window.hacked=1>", "<!--", "]]>", "&lt;", "\"'`",
    "${window.hacked = 1}", "\ud800", "\x00\x1b[2J", "\u2028", "\u202e", "", "DATA", "\\u003c", "x" * 50, "\u6c34",
    "\n", " ",
]  # fmt: skip


@pytest.fixture
def model():
    """Three routed blocks out of six, and causal decisions that differ from those of top-k."""
    torch.manual_seed(1)
    model = GPT(
        GPTConfig(
            block_size=24, vocab_size=len(NASTY), n_layer=6, n_head=2, n_embd=16, predictor_hidden=4, capacity=0.3
        )
    )
    for block in model.routed_blocks:
        torch.nn.init.normal_(block.predictor[0].weight, std=3.0)
        torch.nn.init.normal_(block.predictor[-1].weight, std=3.0)
        torch.nn.init.normal_(block.router.weight, std=3.0)
    return model.eval()


def stored(page):
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', page)[1])


def by_hand(model, ids, routing):
    """Router weights, logits and decisions of each routed block, and the loss and entropy of each prediction."""
    model = copy.deepcopy(model).double()
    x = model.transformer.wte.weight[ids] + model.transformer.wpe.weight[: len(ids)]  # (T, C)
    r, logits, taken = [], [], []
    for layer, block in enumerate(model.transformer.h):
        if not model.config.is_routed(layer):
            x = block(x[None], None)[0]
            continue
        r.append((x @ block.router.weight[0]).tolist())
        logits.append(block.predictor(x).flatten().tolist())
        ranked = sorted(range(len(ids)), key=lambda i: -r[-1][i])
        in_topk = ranked[: max(1, int(0.3 * len(ids)))]
        picked = [i for i in range(len(ids)) if (i in in_topk if routing == "topk" else logits[-1][i] > 0)]
        taken.append([int(i in picked) for i in range(len(ids))])
        update = block.update(x[picked][None], None)[0]
        x = x.clone()
        for i, change in zip(picked, update):
            x[i] += r[-1][i] * change
    p = (model.transformer.ln_f(x) @ model.lm_head.weight.T).softmax(-1)  # (T, vocab_size)
    return {"r": r, "logits": logits, "taken": taken}, -p.log(), -(p * p.log()).sum(-1)


@pytest.mark.parametrize("n", [24, 25, 40, 7, 1])  # a window; one more token, the last one's target; long; short
def test_the_stored_numbers_are_those_of_a_computation_by_hand(model, n):
    ids = torch.randint(len(NASTY), (n,), generator=torch.Generator().manual_seed(n)).tolist()
    T, data = min(n, 24), stored(page(model, CharTokenizer(NASTY), ids))
    assert (len(data["tokens"]), data["n_tokens"], data["layers"], data["n_layer"]) == (T, n, [1, 3, 5], 6)
    for routing in ("topk", "causal"):
        decisions, nats, entropy = by_hand(model, ids[:T], routing)
        assert data[routing]["taken"] == decisions["taken"]
        for name in ("r", "logits"):
            torch.testing.assert_close(data[routing][name], decisions[name], rtol=1e-3, atol=1e-4)
        targets = ids[1 : T + 1]
        loss, none = data[routing]["loss"][: len(targets)], data[routing]["loss"][len(targets) :]
        assert loss == pytest.approx(nats[range(len(targets)), targets].tolist(), rel=1e-3, abs=1e-4)
        assert none == [None] * (T - len(targets))
        assert data[routing]["entropy"] == pytest.approx(entropy.tolist(), rel=1e-3, abs=1e-4)
    # The page decides by the sign of the stored logits. The tokens that differ are what it lights up.
    assert [[int(x > 0) for x in block] for block in data["causal"]["logits"]] == data["causal"]["taken"]
    assert n == 1 or data["causal"]["taken"] != data["topk"]["taken"]


@pytest.mark.parametrize("variant", ["", "attention_only", "falling_capacity"])
def test_the_stored_flops_add_up_to_those_of_the_model(variant):
    model = GPT(GPTConfig(block_size=16, vocab_size=3, n_layer=4, n_head=2, n_embd=8, variant=variant, capacity=0.4))
    data = stored(page(model, CharTokenizer("abc"), [0, 1, 2] * 4))
    flops = data["flops"]
    for counts in ([0, 0], [12, 12], [1, 0], [5, 9]):
        assert model.flops(12, counts) == flops["rest"] + sum(of[n] for of, n in zip(flops["of_block"], counts))
    counts = [sum(block) for block in data["topk"]["taken"]]
    assert model.flops(12) == flops["rest"] + sum(of[n] for of, n in zip(flops["of_block"], counts))


def test_a_tiny_logit_keeps_its_sign():
    values = torch.tensor([1e-9, -1e-9, 0.123456789, -123456.789])
    assert page_module.rounded(values) == [1e-9, -1e-9, 0.123457, -123457.0]


def test_the_model_is_left_as_it_was_and_drops_nothing(model):
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.5
    expected = page(model.eval(), CharTokenizer(NASTY), list(range(18)))
    assert page(model.train(), CharTokenizer(NASTY), list(range(18))) == expected
    assert model.training and not any(block.router._forward_hooks for block in model.routed_blocks)


class Tags(HTMLParser):
    def __init__(self, page):
        super().__init__()
        self.found = []
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.found.append((tag, attributes))


def test_a_text_can_neither_end_its_script_nor_start_another(model):
    nasty = page(model, CharTokenizer(NASTY), list(range(18)))
    tame = page(model, CharTokenizer([chr(97 + i) for i in range(18)]), list(range(18)))
    assert Tags(nasty).found == Tags(tame).found and nasty.count("</script") == tame.count("</script") == 2
    tokens = stored(nasty)["tokens"]
    assert tokens[:2] == NASTY[:2] and tokens[12:16] == NASTY[12:16] and tokens[16] == "\N{PILCROW SIGN}"
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u2028\u202e\ud800]", nasty)
    nasty.encode("utf-8")  # a lone surrogate would raise


def test_the_page_needs_nothing_else(model):
    whole = page(model, CharTokenizer([chr(97 + i) for i in range(18)]), [0, 1, 2])
    assert not re.search(
        r"https?:|//[a-z]|\ssrc=|href|<link|url\(|@import|fetch|XMLHttp|import\(|innerHTML|eval", whole
    )
    assert "default-src 'none'" in whole


def test_models_that_the_page_cannot_show(model):
    tokenizer = CharTokenizer("abc")
    with pytest.raises(UserError, match="with routed blocks and without experts"):
        page(GPT(GPTConfig(block_size=8, vocab_size=3, n_layer=2, n_head=1, n_embd=4, route_every=0)), tokenizer, [0])
    for staged in (False, True):
        config = MoDEConfig(block_size=8, vocab_size=3, n_layer=2, n_head=1, n_embd=4, staged=staged)
        with pytest.raises(UserError, match="with routed blocks and without experts"):
            page(MoDE(config), tokenizer, [0])
    with torch.no_grad():
        model.routed_blocks[0].router.weight.fill_(torch.nan)
    with pytest.raises(ValueError, match="not JSON"):
        page(model, CharTokenizer(NASTY), [0, 1])


def test_the_page_knows_what_decides():
    config = dict(block_size=8, vocab_size=3, n_layer=2, n_head=1, n_embd=4)
    for options, decider in (({}, "predictor"), ({"causal_method": "router"}, "router"), ({"variant": "position"}, "")):
        assert stored(page(GPT(GPTConfig(**config, **options)), CharTokenizer("abc"), [0, 1]))["decider"] == decider


@pytest.mark.parametrize("start", ["ab", "ab\nba" * 5])  # the second is longer than the window of 16
def test_sample_writes_the_page_of_what_it_sampled(tiny, start, tmp_path, monkeypatch, capsys):
    train.train(dataclasses.replace(tiny, n_layer=4, capacity=0.5))
    model, info = checkpoint.load(Path(tiny.out_dir), "best", "cpu")
    with torch.no_grad():
        for block in model.routed_blocks:
            block.predictor[-1].weight.mul_(100)  # so that it takes some tokens and leaves others
    checkpoint.save_best(Path(tiny.out_dir), model, {"data": info["data"]})
    capsys.readouterr()
    (tmp_path / "prompt.txt").write_text(start, encoding="utf-8", newline="")
    followed, follow = [], sample.follow
    monkeypatch.setattr(sample, "follow", lambda *args: followed.append(follow(*args)) or followed[-1])
    argv = [f"--out_dir={tiny.out_dir}", "--device=cpu", "--max_new_tokens=20", "--num_samples=2"]
    sample.main([*argv, f"--start=FILE:{tmp_path / 'prompt.txt'}", f"--html={tmp_path / 'page.html'}"])
    text = capsys.readouterr().out[: len(start) + 20]
    data = stored((tmp_path / "page.html").read_text(encoding="utf-8"))
    read = len(text) if len(start) <= 16 else 20 + 8  # a longer prompt is read from its last half window
    assert "".join(data["tokens"]) == text[-read:][:16].replace("\n", "\N{PILCROW SIGN}") and data["n_tokens"] == read
    # These are the decisions that were made in sampling, one token at a time.
    assert data["causal"]["taken"] == followed[0][1][:, 0, :16].int().tolist()
    assert len({taken for block in data["causal"]["taken"] for taken in block}) == 2


def test_a_notebook_shows_the_page_in_a_frame(model):
    pytest.importorskip("IPython", reason="needs the packages of the extra `notebooks`")
    tokenizer = CharTokenizer([*NASTY[:-4], "<", "'", '"', "&"])
    shown = page_module.show(model, tokenizer, "<'\"&").data
    frame = Tags(shown).found
    assert [tag for tag, _ in frame] == ["div", "iframe"]
    assert dict(frame[1][1])["srcdoc"] == page(model, tokenizer, tokenizer.encode("<'\"&"))
    assert dict(frame[1][1])["sandbox"] == "allow-scripts" and html.unescape(shown).count("<!doctype html>") == 1


# In a real browser


@pytest.fixture
def browser(tmp_path):
    """Opens a page; afterwards checks that it asked for nothing else and that its console is empty."""
    paths = [shutil.which(name) for name in ("chromium", "chromedriver")]
    if webdriver is None or None in paths:
        pytest.skip("needs a browser: pip install selenium, apt-get install chromium chromium-driver")
    options = webdriver.ChromeOptions()
    options.binary_location = paths[0]
    flags = "headless no-sandbox disable-gpu no-first-run disable-background-networking disable-component-update"
    for flag in (*flags.split(), "disable-sync", "hide-scrollbars", f"user-data-dir={tmp_path / 'profile'}"):
        options.add_argument(f"--{flag}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(paths[1]))
    path = tmp_path / "page.html"

    def open_page(whole, width=1000, scheme="light"):
        path.write_text(whole, encoding="utf-8")
        size = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": width < 600}
        driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        driver.execute_cdp_cmd(
            "Emulation.setEmulatedMedia", {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
        )
        driver.get(path.as_uri())
        return driver

    try:
        yield open_page
        events = [json.loads(entry["message"])["message"] for entry in driver.get_log("performance")]
        sent = [event["params"] for event in events if event["method"] == "Network.requestWillBeSent"]
        # (The empty first tab of the browser has requests of its own.)
        urls = [one["request"]["url"] for one in sent if one["documentURL"] == path.as_uri()]
        assert set(urls) == {path.as_uri()} and driver.get_log("browser") == []
    finally:
        driver.quit()


@pytest.fixture
def example(model):
    """A page with every nasty text, and what it stores."""
    ids = [*range(18), 16, 3, 5, 7, 4, 6, 9]
    whole = page(model, CharTokenizer(NASTY), ids)
    return whole, stored(whole)


def find(driver, selector):
    return driver.find_elements("css selector", selector)


def press(driver, *keys):
    for key in keys:
        ActionChains(driver).send_keys(getattr(Keys, key)).perform()


def told(driver):
    """What the page tells about the selected token, in lines."""
    return [find(driver, "#about")[0].text.split("\N{RIGHT DOUBLE QUOTATION MARK}. ")[1]] + [
        row.text for row in find(driver, "#decisions tr")
    ]


def known(data, i, routing, threshold=0.0):
    """What it should tell, from the stored numbers."""
    numbers, words = data[routing], {False: "skips", True: "in"}
    nats = [f"{name} {numbers[name][i]:#.3g}" for name in ("loss", "entropy") if numbers[name][i] is not None]
    lines = [f"Next token: {', '.join(nats)}"]
    for block in (2, 1, 0):
        r, logit = numbers["r"][block][i], numbers["logits"][block][i]
        causal, topk = data["causal"]["logits"][block][i] > threshold, data["topk"]["taken"][block][i] == 1
        probability = 1 / (1 + math.exp(-logit))
        lines.append(f"{data['layers'][block]} {r:#.3g} {probability:.1%} {words[causal]} {words[topk]}")
    return lines


def shares(data, model, threshold=0.0):
    """The table of what both routings take and cost."""
    causal = [sum(logit > threshold for logit in block) for block in data["causal"]["logits"]]
    topk, T = [sum(block) for block in data["topk"]["taken"]], len(data["tokens"])
    lines = [f"block {data['layers'][b]} {causal[b] / T:.1%} {topk[b] / T:.1%}" for b in (2, 1, 0)]
    cost = [model.flops(T, causal), model.flops(T)]
    compact = [f"{n / 1e6:#.4g}M" if n >= 1e6 else f"{n / 1e3:#.4g}K" for n in cost]
    shown = [f"{n / model.flops(T, [T] * 3):.1%} ({short})" for n, short in zip(cost, compact)]
    return [*lines, f"FLOPs {' '.join(shown)}"]


def differing(data, threshold=0.0):
    """The tokens at which the two routings differ."""
    pairs = list(zip(data["causal"]["logits"], data["topk"]["taken"]))
    return [i for i in range(len(data["tokens"])) if any((a[i] > threshold) != (b[i] == 1) for a, b in pairs)]


def lit(driver):
    return [i for i, span in enumerate(find(driver, "#text span")) if "differs" in span.get_attribute("class")]


@pytest.mark.slow
def test_hovering_tells_the_stored_numbers_under_both_routings(browser, example):
    whole, data = example
    driver = browser(whole)
    spans = find(driver, "#text span")
    assert len(spans) == 24 and driver.execute_script("return window.hacked") is None
    assert lit(driver) == differing(data) != []
    for routing in ("causal", "topk"):
        find(driver, f"#{routing}")[0].click()
        for i in (0, 4, differing(data)[0], 23):
            ActionChains(driver).move_to_element(spans[i]).perform()
            assert told(driver) == known(data, i, routing)
        assert lit(driver) == differing(data)  # the same tokens; a cell shows whether it is in with this routing
        kinds = [re.findall(r"var\(--(in|around|in-here|in-there)\)", span.get_attribute("style")) for span in spans]
        other = "topk" if routing == "causal" else "causal"
        names = {(1, 1): "in", (0, 0): "around", (1, 0): "in-here", (0, 1): "in-there"}
        for i in range(24):
            pairs = [(data[routing]["taken"][b][i], data[other]["taken"][b][i]) for b in (2, 1, 0)]
            assert kinds[i] == [names[pair] for pair in pairs]


@pytest.mark.slow
def test_the_keyboard_alone(browser, example, model):
    whole, data = example
    driver = browser(whole)
    thresholds = sorted({0.0, *(x for block in data["causal"]["logits"] for x in block)})

    def rows():
        return [row.text for row in find(driver, "#shares tbody tr")]

    def focus():
        return driver.execute_script("return document.activeElement.id || document.activeElement.tagName")

    order = []
    for _ in range(5):
        press(driver, "TAB")
        order.append(focus())
    assert order == ["causal", "reset", "slider", "SPAN", "SUMMARY"]  # one stop for all tokens
    assert rows() == shares(data, model)
    find(driver, "#reset")[0].send_keys("\t")
    assert focus() == "slider"
    press(driver, "ARROW_RIGHT")  # a step is one decision
    threshold = thresholds[thresholds.index(0.0) + 1]
    assert rows() == shares(data, model, threshold) and lit(driver) == differing(data, threshold)
    press(driver, "END")
    assert rows() == shares(data, model, thresholds[-1]) and rows()[0].startswith("block 5 0.0% ")
    press(driver, "HOME")
    assert rows() == shares(data, model, thresholds[0] - 1) and rows()[0].startswith("block 5 100.0% ")
    assert rows()[-1].startswith("FLOPs 100.0% (")
    press(driver, "TAB")
    assert told(driver) == known(data, 0, "causal", thresholds[0] - 1)
    lines = "const {left, top} = text.children[%d].getClientRects()[0]; return [Math.round(left), Math.round(top)]"
    places = [driver.execute_script(lines % i) for i in range(24)]
    tops = sorted({top for _, top in places})

    def nearest(i, line):
        return min((j for j in range(24) if places[j][1] == tops[line]), key=lambda j: abs(places[j][0] - places[i][0]))

    below, above = nearest(0, 1), nearest(nearest(0, 1), 0)
    keys = "ARROW_RIGHT ARROW_RIGHT ARROW_LEFT END ARROW_RIGHT HOME ARROW_LEFT ARROW_UP ARROW_DOWN ARROW_UP".split()
    for key, i in zip(keys, (1, 2, 1, 23, 23, 0, 0, 0, below, above), strict=True):
        press(driver, key)
        assert told(driver) == known(data, i, "causal", thresholds[0] - 1), key
    find(driver, "#reset")[0].send_keys("\n")
    assert rows() == shares(data, model)
    find(driver, "#causal")[0].send_keys(Keys.ARROW_RIGHT)  # from one radio button to the next
    assert told(driver) == known(data, above, "topk")
    find(driver, "#slider")[0].send_keys(Keys.ARROW_LEFT)  # the threshold is of causal routing, so this switches back
    assert told(driver)[0] == known(data, above, "causal")[0]
    assert find(driver, "#token")[0].get_attribute("role") == "status"  # a screen reader says what changes there
    names = [find(driver, f"#{name}")[0].accessible_name for name in ("causal", "topk", "slider", "reset")]
    assert [name.split()[0] for name in names] == ["causal", "top-k", "Threshold:", "reset"]


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_phone_needs_no_sideways_scrolling_and_every_colour_can_be_read(browser, example, scheme):
    whole, data = example
    driver = browser(whole, width=400, scheme=scheme)
    assert driver.execute_script("return [innerWidth, document.documentElement.scrollWidth]") == [400, 400]
    driver.execute_cdp_cmd("Emulation.setTouchEmulationEnabled", {"enabled": True})
    for i in (5, 17):
        box = driver.execute_script(f"""
            text.children[{i}].scrollIntoView({{block: "center"}});
            const box = text.children[{i}].getClientRects()[0];
            return {{x: box.x + box.width / 2, y: box.y + box.height / 2}}""")
        driver.execute_cdp_cmd("Input.dispatchTouchEvent", {"type": "touchStart", "touchPoints": [box]})
        driver.execute_cdp_cmd("Input.dispatchTouchEvent", {"type": "touchEnd", "touchPoints": []})
        assert told(driver) == known(data, i, "causal")

    def luminance(red, green, blue):
        parts = [c / 12.92 if c <= 0.04 else ((c + 0.055) / 1.055) ** 2.4 for c in (red, green, blue)]
        return 0.2126 * parts[0] + 0.7152 * parts[1] + 0.0722 * parts[2]

    for routed in (1, 2, 3, 6, 11, 12, 18):
        colours = driver.execute_script(f"""
            return [...Array({routed} + 1).keys()].map(depth => {{
                const style = getComputedStyle(text.appendChild(make("b", "", shade(depth * L / {routed}))));
                return [style.color, style.backgroundImage.match(/color\\(srgb ([^)]*)\\)/)[1]];
            }})""")
        shades = []
        for text, background in colours:
            text = luminance(*(int(c) / 255 for c in re.findall(r"\d+", text)[:3]))
            shades.append(luminance(*map(float, background.split())))
            assert (max(text, shades[-1]) + 0.05) / (min(text, shades[-1]) + 0.05) > 4.5  # the minimum of WCAG
        # One step after another away from the paper, so it also reads in greyscale.
        assert shades == sorted(shades, reverse=scheme == "light") and len(set(shades)) == routed + 1


@pytest.mark.slow
def test_a_thousand_tokens_follow_the_slider(browser):
    config = GPTConfig(block_size=1024, vocab_size=3, n_layer=12, n_head=1, n_embd=8)
    ids = torch.randint(3, (1024,), generator=torch.Generator().manual_seed(0)).tolist()
    driver = browser(page(GPT(config), CharTokenizer("ab\n"), ids))
    milliseconds = driver.execute_script("""
        const begun = performance.now();
        for (let i = 0; i < 10; i++) {
          slider.value = slider.max * i / 9;
          slider.dispatchEvent(new Event("input", {bubbles: true}));
          text.offsetHeight;  // waits for the layout
        }
        return (performance.now() - begun) / 10;""")
    assert milliseconds < 500  # about 30 on a laptop's core


@pytest.mark.slow
def test_a_control_shows_its_logit_and_no_probability(browser):
    config = GPTConfig(block_size=8, vocab_size=3, n_layer=2, n_head=1, n_embd=4, variant="position", capacity=0.5)
    driver = browser(page(GPT(config), CharTokenizer("abc"), [0, 1, 2, 0]))
    assert find(driver, "#threshold")[0].text == "logit 0.00" and find(driver, "#decider")[0].text == "logit"
    assert [row.text.split()[0] for row in find(driver, "#decisions tr")] == ["1"] and "%" not in told(driver)[1]
