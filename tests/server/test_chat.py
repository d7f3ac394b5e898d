"""/v1/chat/completions through the wire: templates, contents, log-probabilities, predictions."""

import pytest

from foretoken.errors import RequestError
from foretoken.server.chat import chat_call
from foretoken.server.schemas import ChatRequest
from foretoken.server.settings import ServerSettings
from foretoken.server.token_texts import TokenTexts
from tests.server.conftest import CHAT_TEMPLATE

HELLO = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Tell me of Tom."}]


@pytest.fixture
def chat(http):
    """Return the answer to a conversation, or its error."""

    def post(messages=HELLO, **fields):
        body = {"model": "stories", "messages": messages, "max_tokens": 8, "temperature": 0}
        return http.post("/v1/chat/completions", json={**body, **fields}).json()

    return post


@pytest.fixture
def continued(http, llm):
    """Return what the model says after a text, whose special tokens are its own."""

    def post(text, **fields):
        prompt = llm.tokenizer.encode(text, adds_special=False)
        body = {"model": "stories", "prompt": prompt, "max_tokens": 8, "temperature": 0, **fields}
        return http.post("/v1/completions", json=body).json()["choices"][0]["text"]

    return post


def said(answer):
    return answer["choices"][0]["message"]["content"]


def test_a_conversation_goes_on_as_its_template_writes_it(chat, continued):
    text = "system: Be kind.\nuser: Tell me of Tom.\nassistant:"
    answer = chat()
    assert said(answer) == continued(text)
    assert answer["choices"][0]["message"]["role"] == "assistant"
    assert answer["object"] == "chat.completion"


def test_parts_of_a_content_are_lines(chat, continued):
    parts = [{"type": "text", "text": "One"}, {"type": "text", "text": "two"}]
    answer = chat([{"role": "user", "content": parts}])
    assert said(answer) == continued("user: One\ntwo\nassistant:")


def test_the_last_message_can_go_on(chat, continued):
    messages = [*HELLO, {"role": "assistant", "content": "Tom had a"}]
    answer = chat(messages, continue_final_message=True)
    text = "system: Be kind.\nuser: Tell me of Tom.\nassistant: Tom had a"
    assert said(answer) == continued(text)


def test_variables_reach_the_template(chat, continued):
    answer = chat(HELLO[1:], chat_template_kwargs={"opening": "narrator"})
    assert said(answer) == continued("user: Tell me of Tom.\nnarrator:")
    answer = chat(HELLO[1:], add_generation_prompt=False)
    assert said(answer) == continued("user: Tell me of Tom.\n")


def test_as_many_tokens_as_there_is_room_for(chat, llm):
    answer = chat(max_tokens=None, ignore_eos=True)
    assert answer["usage"]["total_tokens"] == llm.info.context_limit
    assert chat(max_tokens=None, max_completion_tokens=3)["usage"]["completion_tokens"] == 3


def test_logprobs_have_bytes(chat):
    answer = chat(logprobs=True, top_logprobs=3)
    [choice] = answer["choices"]
    entries = choice["logprobs"]["content"]
    assert len(entries) == answer["usage"]["completion_tokens"]
    spelled = bytes(byte for entry in entries for byte in entry["bytes"])
    assert spelled.decode() == choice["message"]["content"]
    for entry in entries:
        assert entry["token"].encode() == bytes(entry["bytes"])
        assert len(entry["top_logprobs"]) == 3
        assert entry["top_logprobs"][0]["logprob"] >= entry["logprob"]
    assert chat(logprobs=True)["choices"][0]["logprobs"]["content"][0]["top_logprobs"] == []
    assert chat()["choices"][0]["logprobs"] is None


def test_a_prediction_is_read_once_however_many_choices_it_has(llm, monkeypatch):
    texts = []
    encode = llm.encode
    monkeypatch.setattr(llm, "encode", lambda given: texts.append(given) or encode(given))
    body = ChatRequest(
        model="stories",
        messages=HELLO,
        n=3,
        prediction={"type": "content", "content": "a dog"},
    )
    settings = ServerSettings(model_name="stories", chat_template="{{ messages[0].content }}")
    call = chat_call(llm, settings, body, "x")
    assert [it.reference_ids for it in call.submissions] == 3 * [encode("a dog")]
    assert texts == ["a dog"]


@pytest.mark.parametrize("parts", [False, True])
def test_a_prediction_changes_speed_and_nothing_else(steady, parts):
    def chat(**fields):
        body = {"model": "stories", "messages": HELLO, "max_tokens": 40, "temperature": 0}
        return steady.post("/v1/chat/completions", json={**body, **fields}).json()

    plain = chat(speculation={"enabled": False})
    content = said(plain)
    prediction = {
        "type": "content",
        "content": [{"type": "text", "text": content}] if parts else content,
    }
    predicted = chat(prediction=prediction, speculation={"drafters": ["reference"]})
    assert said(predicted) == content
    details = predicted["usage"]["completion_tokens_details"]
    stats = predicted["foretoken"]["stats"][0]
    assert details["accepted_prediction_tokens"] == stats["accepted_by"]["reference"] > 20
    num_rejected = stats["drafted_by"]["reference"] - stats["accepted_by"]["reference"]
    assert details["rejected_prediction_tokens"] == num_rejected
    assert plain["usage"]["completion_tokens_details"]["accepted_prediction_tokens"] == 0


@pytest.mark.parametrize(
    ("messages", "fields", "words"),
    [
        ([{"role": "developer", "content": "x"}], {}, "no developers here"),
        (HELLO, {"chat_template_kwargs": {"chat_template": "x"}}, "cannot be called"),
        (HELLO, {"chat_template_kwargs": {"self": 1}}, "cannot be called"),
        (HELLO, {"chat_template_kwargs": {"messages": "x"}}, "cannot be called"),
        (HELLO, {"max_completion_tokens": 5}, "give one of them"),
        (HELLO, {"top_logprobs": 5}, "set logprobs to true"),
        (HELLO, {"add_generation_prompt": True, "continue_final_message": True}, "give one of"),
        ([], {}, "at least 1 item"),
    ],
)
def test_what_a_template_cannot_write_is_refused(chat, messages, fields, words):
    error = chat(messages, **fields)["error"]
    assert words in error["message"]
    assert error["type"] == "invalid_request_error"


def test_a_template_of_the_servers_comes_before_the_models(llm):
    text = llm.tokenizer.render_chat(HELLO, template=CHAT_TEMPLATE)
    assert text.endswith("assistant:")
    with pytest.raises(RequestError, match="no chat template") as caught:
        llm.tokenizer.render_chat(HELLO)
    assert "--chat-template" in caught.value.hint


def test_a_template_runs_in_a_sandbox(llm):
    """Through the objects of a template one must not come to those of the process."""
    escape = "{{ messages.__class__.__mro__[1].__subclasses__() }}"
    with pytest.raises(RequestError, match="refuses the conversation"):
        llm.tokenizer.render_chat(HELLO, template=escape)


def test_parts_of_characters_are_named_by_their_bytes(llm):
    texts = TokenTexts(llm)
    [first, *_] = llm.tokenizer.encode("é", adds_special=False)
    spelled = texts.spelling(first)
    if spelled == "é".encode():  # the vocabulary has it whole
        pytest.skip("é is one token")
    assert texts.name(first) == "bytes:" + "".join(f"\\x{byte:02x}" for byte in spelled)
