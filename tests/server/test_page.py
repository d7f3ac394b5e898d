"""The page at `/`, in headless Chromium, on a real server with the embedded model."""

import json
import re
import shutil
import time
from importlib.resources import files

import httpx
import pytest
from playwright.sync_api import expect, sync_playwright

from foretoken import LLM
from foretoken.assets import EMBEDDED
from foretoken.server.app import create_app
from foretoken.server.page import ASSETS, INDEX, PUBLIC_PATHS
from foretoken.server.settings import ServerSettings
from tests.server.conftest import served

DRAFT = str(EMBEDDED["stories"].draft)
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
API_KEY = "a-key-for-the-tests"
FOLDER = files("foretoken.server") / "page_files"
WAIT_MS = 15_000
CHAT = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
KEYED = ServerSettings(
    model_name="stories", port=0, api_keys=(API_KEY,), max_new_tokens_limit=16, chat_template=CHAT
)
ATTACK = "<script>window.attacked = 1</script><img src=x onerror='window.attacked = 1'>"


@pytest.fixture(scope="module")
def llm():
    """The embedded pair, drafting in every step: whether it pays is not tested here."""
    loaded = LLM("stories", drafters=("draft-model:path=" + DRAFT, "suffix"), max_nodes=8)
    yield loaded
    loaded.close()


@pytest.fixture(scope="module")
def server(request, llm):
    """One server for all tests but those that ask, as a parameter, for settings of their own."""
    settings = getattr(request, "param", ServerSettings(model_name="stories", port=0))
    with served(create_app(llm, settings), settings) as running:
        yield running


@pytest.fixture(scope="module")
def browser():
    if CHROMIUM is None:
        pytest.skip("no chromium on the path")
    expect.set_options(timeout=WAIT_MS)
    with sync_playwright() as playwright:
        # Without its sandbox, which needs rights that containers withhold; it sees this page only.
        launched = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield launched
        launched.close()


@pytest.fixture(scope="module")
def still_context(browser):
    """Where nothing moves: a race is shown at once, as it ends."""
    context = browser.new_context(reduced_motion="reduce")
    yield context
    context.close()


@pytest.fixture
def page(still_context, server):
    """The page, opened; it must ask no other host and report no error of its own."""
    tab = still_context.new_page()
    tab.set_default_timeout(WAIT_MS)
    requested, faults = [], []
    tab.on("request", lambda request: requested.append(request.url))
    tab.on("pageerror", lambda error: faults.append(str(error)))
    tab.on("console", lambda message: faults.append(message.text))
    tab.goto(f"{server.base_url}/")
    yield tab
    tab.close()
    assert requested
    assert [url for url in requested if not url.startswith(f"{server.base_url}/")] == []
    # Chromium itself notes answers that are errors; whether the page shows them, the tests say.
    assert [fault for fault in faults if "Failed to load resource" not in fault] == []


def ask(tab, prompt="Once upon a time", **fields):
    """Fill the form; names of fields are their ids with underscores."""
    tab.fill("#prompt", prompt)
    for name, value in fields.items():
        tab.fill(f"#{name.replace('_', '-')}", str(value))


def generate(tab):
    tab.click("#generate")
    expect(tab.locator("#generate")).to_be_enabled()


def output_of(tab, selector="#output"):
    """The output alone, without the prompt before it."""
    return "".join(tab.locator(f"{selector} .token").all_text_contents())


def answer_with(tab, body, status=200, **headers):
    """Let the completions API answer with something that the server would not say."""
    tab.route(
        "**/v1/completions",
        lambda route: route.fulfill(status=status, body=body, headers=headers),
    )


def stream_of(*tokens, is_whole=True):
    """The stream of (id, text, source) tokens, a chunk each."""
    chunks = [
        {"choices": [{"text": text, "foretoken": {"tokens": [
            {"id": token_id, "text": text, "source": source}
        ]}}]}
        for token_id, text, source in tokens
    ]  # fmt: skip
    events = [json.dumps(chunk) for chunk in chunks] + ["[DONE]"] * is_whole
    return "".join(f"data: {event}\n\n" for event in events)


# -- files ---------------------------------------------------------------------------------------


def test_every_file_has_its_route_and_no_path_leads_elsewhere(client):
    assert {item.name for item in FOLDER.iterdir()} == {INDEX, *ASSETS}
    for path in PUBLIC_PATHS:
        response = client.get(path)
        name = path.removeprefix("/page/") if path != "/" else INDEX
        assert response.content == (FOLDER / name).read_bytes()
        assert "default-src 'none'" in response.headers["content-security-policy"]
    for path in ("/page/", "/page/index.html", "/page/..%2fpage.py", "/page/%2e%2e/page.py"):
        assert client.get(path).status_code == 404, path


def test_files_have_nothing_inline_and_nothing_from_elsewhere():
    foreign = re.compile(r"https?:|//[a-z]|\son\w+=|\sstyle=|<style|javascript:|@import|url\(")
    own = "http://www.w3.org/2000/svg"  # a name, not an address
    for name in (INDEX, *ASSETS):
        text = (FOLDER / name).read_text(encoding="utf-8").replace(own, "")
        assert foreign.findall(text) == [], name
    index = (FOLDER / INDEX).read_text(encoding="utf-8")
    assert re.findall(r"<script[^>]*>(.*?)</script>", index, re.DOTALL) == [""]


def test_the_page_knows_the_model_and_who_can_draft(client):
    config = client.get("/page/config").json()
    assert config["model"] == "stories"
    assert config["chat"] is False
    assert config["exactness"] == "bitwise"
    assert config["max_new_tokens"] == 512
    recalls = {drafter["name"]: drafter["recalls"] for drafter in config["drafters"]}
    assert recalls == {"draft-model": False, "suffix": True}  # not those for special requests


# -- playground ----------------------------------------------------------------------------------


def test_the_text_is_the_apis_and_shows_who_found_each_token(page, client):
    page.uncheck("#drafters input[value=suffix]")
    ask(page, seed=7, max_tokens=48, max_nodes=4)
    generate(page)
    body = {"model": "stories", "prompt": "Once upon a time", "seed": 7, "temperature": 0.8}
    body |= {"max_tokens": 48, "speculation": {"enabled": False}}
    expected = client.post("/v1/completions", json=body).json()
    assert output_of(page) == expected["choices"][0]["text"]

    num_tokens = page.locator("#output .token").count()
    assert num_tokens == expected["usage"]["completion_tokens"]
    drafted = page.locator("#output .drafted")
    assert 0 < drafted.count() < num_tokens
    assert page.locator("#output .drafted.colour-0.line-0").count() == drafted.count()
    expect(drafted.first).to_have_attribute("title", re.compile(r"^draft-model, step \d+$"))
    legend = page.locator("#legend").inner_text()
    assert f"draft-model {drafted.count()} tokens" in legend
    num_steps = num_tokens - drafted.count()  # each ends with a token of the target's own
    expect(page.locator("#status")).to_have_text(
        re.compile(rf"^{num_tokens} tokens in ({num_steps}|{num_steps + 1}) passes")
    )
    numbers = page.locator("#request-numbers").inner_text()
    assert re.search(r"Draft tokens scored\s+\d+", numbers)
    assert re.search(r"Exactness\s+bitwise", numbers)
    assert re.search(r"Tokens per step\s+\d\.\d\d", page.locator("#server-numbers").inner_text())
    expect(page.locator("#depths")).to_have_attribute("aria-label", re.compile(r"depth 1: \d+ %"))


def test_without_speculation_nobody_but_the_target_is_named(page):
    page.uncheck("#speculate")
    ask(page, seed=7, max_tokens=12)
    generate(page)
    expect(page.locator("#status")).to_have_text("12 tokens in 12 passes of the target.")
    assert page.locator("#output .drafted").count() == 0
    expect(page.locator("#legend")).to_have_text("the target itself 12 tokens")


def test_what_a_reader_has_to_know_of_the_numbers_is_said(page):
    ask(page, seed=7, max_tokens=1)  # after it nothing is left to guess
    generate(page)
    expect(page.locator("#status")).to_have_text(
        re.compile("^1 token in 1 pass of the target. Nothing was drafted")
    )
    page.click("#tab-race")
    page.click("#start")
    expect(page.locator("#caution")).to_contain_text("Nothing was drafted")

    page.uncheck("#drafters input[value=draft-model]")
    ask(page, temperature=0, max_tokens=24)
    page.fill("#rounds", "2")  # in the second, suffix knows the text of the first
    page.click("#start")
    expect(page.locator("#caution")).to_contain_text("Some tokens were found by suffix")


def test_arrow_keys_tell_token_by_token_who_found_it(page):
    answer_with(
        page, stream_of((5, " a", "draft-model"), (6, " b", "draft-model+suffix"), (7, "c", ""))
    )
    generate(page)
    page.focus("#output")
    page.keyboard.press("ArrowRight")
    expect(page.locator("#token-note")).to_have_text(
        'Token 1, " a" (id 5): found by draft-model in step 1.'
    )
    page.keyboard.press("ArrowRight")
    expect(page.locator("#token-note")).to_contain_text("found by draft-model and suffix in step 1")
    page.keyboard.press("End")
    expect(page.locator("#token-note")).to_contain_text("found by the target itself in step 1")


def test_an_empty_seed_is_drawn_anew_and_shown(page):
    ask(page, max_tokens=4)
    seeds = []
    for _ in range(2):
        generate(page)
        seeds += re.findall(r"Seed\s+(\d+)", page.locator("#request-numbers").inner_text())
    assert len(seeds) == 2
    assert seeds[0] != seeds[1]  # equal by chance once in 2**32


def test_stop_ends_the_request_on_the_server(page, server, client, llm, monkeypatch):
    step = llm.engine.step

    def slow_step():
        time.sleep(0.02)
        return step()

    monkeypatch.setattr(llm.engine, "step", slow_step)
    page.uncheck("#speculate")
    ask(page, temperature=0, max_tokens=400)
    page.click("#generate")
    expect(page.locator("#output .token").nth(3)).to_be_visible()  # it streams
    expect(page.locator("#output")).to_have_attribute("aria-busy", "true")
    page.click("#stop")
    expect(page.locator("#status")).to_have_text(re.compile(r"^Stopped after \d+ tokens\.$"))
    assert page.locator("#output .token").count() < 200
    expect(page.locator("#failure")).to_be_hidden()
    end_s = time.monotonic() + 2
    while client.get("/stats").json()["num_running"] and time.monotonic() < end_s:
        time.sleep(0.02)
    assert client.get("/stats").json()["num_running"] == 0


def test_tokens_share_the_apis_text_even_where_theirs_differ(page):
    shares = page.evaluate(
        """async () => {
            const { share } = await import("/page/tokens.js");
            const parts = (text, ...own) =>
                share(text, own.map((text) => ({ text }))).map((token) => token.part);
            return [
                parts("one two", "one", " two"),
                parts("\u00e9!", "\ufffd", "\ufffd", "!"), // two tokens are one character
                parts("", "held", " back"),
                parts("held back now", " now"),
            ];
        }"""
    )
    assert shares == [["one", " two"], ["", "", "é!"], ["", ""], ["held back now"]]


@pytest.mark.parametrize("server", [KEYED], indirect=True)
def test_a_server_with_a_key_and_a_chat_template(page, server):
    expect(page.locator("#failure")).to_contain_text("wants an API key")
    page.fill("#key", "not-the-right-one")
    page.keyboard.press("Enter")
    expect(page.locator("#failure")).to_contain_text("wants an API key, or another one")
    page.fill("#key", "k\u00e9y")  # fits into no header
    page.keyboard.press("Enter")
    expect(page.locator("#failure")).to_contain_text("letters, digits and signs")
    page.fill("#key", API_KEY)
    page.click("#key-form button")
    expect(page.locator("#model")).to_contain_text("serves stories")
    expect(page.locator("#failure")).to_be_hidden()
    expect(page.locator("#key-form")).to_be_hidden()
    expect(page.locator("#key")).to_have_value("")
    assert page.evaluate("[localStorage.length, sessionStorage.length, document.cookie]") == [
        0,
        0,
        "",
    ]

    expect(page.locator("#max-tokens")).to_have_value("16")  # not 128, which would be refused
    expect(page.locator("#chat")).to_be_checked()
    ask(page, prompt="One day", seed=3)
    generate(page)
    body = {"messages": [{"role": "user", "content": "One day"}], "model": "stories", "seed": 3}
    body |= {"temperature": 0.8, "max_tokens": 16}
    headers = {"Authorization": f"Bearer {API_KEY}"}
    answer = httpx.post(f"{server.base_url}/v1/chat/completions", json=body, headers=headers)
    assert output_of(page) == answer.json()["choices"][0]["message"]["content"]
    assert page.locator("#output .prompt").count() == 0  # a message is not the text's beginning


# -- errors --------------------------------------------------------------------------------------


def test_a_refused_request_is_explained(page):
    ask(page, prompt="word " * 600)
    generate(page)
    expect(page.locator("#failure")).to_contain_text("refused the request (400)")
    ask(page, max_tokens=4)
    generate(page)
    expect(page.locator("#failure")).to_be_hidden()
    assert page.locator("#output .token").count() == 4


@pytest.mark.parametrize(
    ("status", "body", "headers", "sentence"),
    [
        (
            429,
            '{"error": {"message": "128 wait"}}',
            {"Retry-After": "7"},
            "busy (429): 128 wait. Try again in 7 s.",
        ),
        (503, '{"error": {"message": "it stops"}}', {}, "The server failed (503): it stops"),
        (502, "<h1>Bad gateway</h1>", {}, "The server failed (502)"),
        (200, stream_of((1, "a", ""), is_whole=False), {}, "lost before the text was complete"),
        (200, 'data: {"error": {"message": "no such end"}}\n\n', {}, "broke off: no such end"),
        (200, "data: <p>login</p>\n\n", {}, "not JSON"),
    ],
    ids=["busy", "stopping", "proxy", "cut", "error-event", "not-json"],
)  # fmt: skip
def test_what_goes_wrong_is_said_in_a_sentence(page, status, body, headers, sentence):
    answer_with(page, body, status, **headers)
    generate(page)
    expect(page.locator("#failure")).to_be_visible()
    expect(page.locator("#failure")).to_contain_text(sentence)
    expect(page.locator("#stop")).to_be_disabled()
    page.click("#tab-race")
    page.click("#start")
    expect(page.locator("#start")).to_be_enabled()
    expect(page.locator("#failure")).to_contain_text(sentence)


def test_a_server_that_is_gone_is_said_to_be_gone(page):
    page.route("**/v1/completions", lambda route: route.abort("connectionrefused"))
    generate(page)
    expect(page.locator("#failure")).to_contain_text("cannot be reached")


def test_nobody_to_draft_is_found_before_anything_is_sent(page):
    page.uncheck("#drafters input[value=draft-model]")
    page.uncheck("#drafters input[value=suffix]")
    generate(page)
    expect(page.locator("#failure")).to_contain_text("choose at least one drafter")


def test_markup_is_shown_as_text(page):
    answer_with(page, stream_of((1, ATTACK, ATTACK), (2, "</div>", "")))
    ask(page, prompt=ATTACK)
    generate(page)
    assert output_of(page) == f"{ATTACK}</div>"
    expect(page.locator("#output .prompt")).to_have_text(ATTACK)
    expect(page.locator("#legend")).to_contain_text(ATTACK)
    answer_with(page, json.dumps({"error": {"message": ATTACK}}), 400)
    generate(page)
    expect(page.locator("#failure")).to_contain_text(ATTACK)
    assert page.locator("main script, main img, #failure *").count() == 0
    assert page.evaluate("window.attacked") is None


# -- race ----------------------------------------------------------------------------------------


def test_a_race_shows_the_same_text_twice_and_how_fast_each_was(page, client):
    page.click("#tab-race")
    ask(page, seed=11, max_tokens=32)
    page.click("#start")
    verdict = page.locator("#verdict")
    expect(verdict).to_have_class("verdict same")
    texts = [output_of(page, f"#lane-{name}") for name in ("plain", "speculative")]
    body = {"model": "stories", "prompt": "Once upon a time", "seed": 11, "temperature": 0.8}
    expected = client.post("/v1/completions", json=body | {"max_tokens": 32}).json()
    assert texts == [expected["choices"][0]["text"]] * 2
    assert page.locator("#lane-plain .drafted").count() == 0
    assert page.locator("#lane-speculative .drafted").count() > 0
    plain_ms, speculative_ms, ratio = round_of(page, 0)
    assert ratio == pytest.approx(plain_ms / speculative_ms, abs=0.02)  # shown with two digits
    expect(verdict).to_have_text(
        f"Speculation was {ratio:.2f} times as fast as plain decoding; "
        "both gave the same 32 tokens."
    )

    page.fill("#rounds", "2")
    page.click("#repeat")
    expect(verdict).to_contain_text("Median of 3 rounds")
    expect(verdict).to_contain_text("both gave the same tokens in each")
    ratios = sorted(round_of(page, place)[2] for place in range(3))
    expect(verdict).to_contain_text(f"{ratios[1]:.2f} times as fast as plain")
    expect(verdict).to_contain_text(f"({ratios[0]:.2f} to {ratios[2]:.2f})")
    cells = page.locator("#rounds-table tbody tr").evaluate_all(
        "rows => rows.map((row) => [row.cells[1].textContent, row.cells[2].textContent])"
    )
    assert cells == [["11", "plain"], ["12", "speculation"], ["13", "plain"]]
    expect(page.locator("#repeat")).to_be_enabled()
    page.fill("#seed", "99")  # another request is another measurement
    expect(page.locator("#repeat")).to_be_disabled()


def round_of(tab, place):
    """Milliseconds of plain decoding and of speculation, and their ratio."""
    cells = tab.locator("#rounds-table tbody tr").nth(place).locator("td").all_text_contents()
    return tuple(map(float, cells[3:6]))


def test_a_race_whose_texts_part_says_so(page):
    def answer(route):
        speculates = route.request.post_data_json["speculation"]["enabled"]
        tokens = (1, " a", ""), (2 + speculates, " b", "")
        route.fulfill(body=stream_of(*tokens))

    page.route("**/v1/completions", answer)
    page.click("#tab-race")
    page.click("#start")
    expect(page.locator("#verdict")).to_have_class("verdict different")
    expect(page.locator("#verdict")).to_contain_text("in round 1 the texts part at token 2")


def test_both_lanes_move_at_the_measured_speeds(browser, server):
    context = browser.new_context()  # one that may move
    tab = context.new_page()
    tab.goto(f"{server.base_url}/")
    tab.click("#tab-race")
    ask(tab, temperature=0, max_tokens=128)
    tab.select_option("#pace", "50")  # 128 passes of 0.3 ms or more take 2 s then
    tab.click("#start")
    expect(tab.locator("#race-status")).to_contain_text("50 times slower than it was")
    shown = tab.locator(".lane .token")
    expect(shown.nth(2)).to_be_visible()
    assert shown.count() < 2 * 128
    expect(tab.locator("#verdict")).to_be_empty()
    tab.click("#race-stop")  # enough seen
    expect(shown).to_have_count(2 * 128)
    expect(tab.locator("#verdict")).to_contain_text("both gave the same 128 tokens")
    context.close()


def test_the_page_fits_a_phone_and_tabs_obey_the_arrow_keys(page):
    page.set_viewport_size({"width": 360, "height": 740})
    width = "document.documentElement.scrollWidth"
    assert page.evaluate(width) <= 360
    page.focus("#tab-playground")
    page.keyboard.press("ArrowRight")
    expect(page.locator("#race")).to_be_visible()
    expect(page.locator("#tab-race")).to_be_focused()
    assert page.evaluate(width) <= 360
    unnamed = page.locator("input:visible, textarea:visible, select:visible").evaluate_all(
        "fields => fields.filter((field) => field.labels.length === 0).map((field) => field.id)"
    )
    assert unnamed == []
