"""`foretoken serve` on the command line; what a running one does is tested with the server."""

import socket
from pathlib import Path
from types import SimpleNamespace

import pytest
import typer

import foretoken.cli.serve as command
from foretoken.cli.main import app
from foretoken.engine.llm import LLM
from foretoken.server.lifecycle import bind
from foretoken.server.settings import ServerSettings

PAGE = Path(__file__).resolve().parents[2] / "docs" / "serve.md"


@pytest.fixture
def serve(cli, models_on_disk, monkeypatch):
    """Run the command with a server that has ended as soon as it began."""
    seen = SimpleNamespace(settings=None, llm=None, ends_well=True)

    def run_server(llm, settings, listener, *, on_start, on_signal):
        seen.llm, seen.settings = llm, settings
        on_start()
        on_signal()
        return seen.ends_well

    monkeypatch.setattr("foretoken.server.app.run_server", run_server)
    monkeypatch.setattr("foretoken.server.logs.configure_logging", lambda *_, **__: None)
    monkeypatch.delenv(command.KEYS_VARIABLE, raising=False)

    def run_here(*arguments, model=models_on_disk.target):
        words = ["serve", "--model", model, "--drafter", "suffix", "--port", 0, *arguments]
        return SimpleNamespace(**vars(cli(*words)), settings=seen.settings, llm=seen.llm)

    run_here.seen = seen
    return run_here


def test_it_says_where_and_how(serve):
    done = serve()
    assert (done.code, done.out) == (0, "")
    first, second, third = done.err.splitlines()
    assert first.startswith("serving target with suffix")
    assert "on http://127.0.0.1:" in first
    assert second.startswith("curl http://127.0.0.1:")
    assert '"model": "target"' in second
    assert "once more stops at once" in third


def test_defaults_are_those_of_the_settings(serve):
    assert serve().settings == ServerSettings(model_name="target", port=0)


def test_options_reach_the_settings_and_the_engine(serve, tmp_path):
    template = tmp_path / "chat.jinja"
    template.write_text("{{ messages[0].content }}", encoding="utf-8")
    done = serve(
        *("--model-name", "mine", "--max-queue", 3, "--max-choices", 2, "--deadline", 4.5),
        *("--max-body-bytes", 1000, "--max-new-tokens-limit", 50, "--drain", 2.5),
        *("--cors-origin", "https://a.example", "--cors-origin", "https://b.example"),
        *("--chat-template", template, "--log-prompts", "--api-key", "key-number-1"),
        *("--max-requests", 3, "--kv-cache-tokens", 320, "--max-grammar-bytes", 900),
        *("--max-connections", 40, "--read-timeout", 1.5),
    )
    assert done.code == 0
    assert done.settings == ServerSettings(
        model_name="mine",
        port=0,
        max_queue=3,
        max_choices=2,
        deadline_s=4.5,
        max_body_bytes=1000,
        max_grammar_bytes=900,
        max_connections=40,
        read_timeout_s=1.5,
        max_new_tokens_limit=50,
        drain_s=2.5,
        cors_origins=("https://a.example", "https://b.example"),
        chat_template="{{ messages[0].content }}",
        log_prompts=True,
        api_keys=("key-number-1",),
    )
    assert done.llm.engine.max_requests == 3
    assert done.llm.engine.cache.num_blocks == 20


def test_keys_of_the_environment(serve, monkeypatch):
    monkeypatch.setenv(command.KEYS_VARIABLE, " key-number-1, key-number-2\nkey-number-4\n")
    done = serve("--api-key", "key-number-2", "--api-key", "key-number-3")
    assert done.settings.api_keys == (
        "key-number-2",
        "key-number-3",
        "key-number-1",
        "key-number-4",
    )
    assert "Authorization: Bearer $KEY" in done.err
    assert "key-number" not in done.err


def test_a_warning_for_who_opens_it_to_everybody(serve):
    done = serve("--host", "0.0.0.0")
    assert "warning: everybody who reaches 0.0.0.0 may use it" in done.err
    assert command.KEYS_VARIABLE in done.err
    assert "warning" not in serve("--host", "0.0.0.0", "--api-key", "key-number-1").err
    assert "warning" not in serve().err


def test_in_json_no_line_is_for_people_alone(serve):
    done = serve("--log-format", "json")
    assert done.code == 0
    assert not [line for line in done.err.splitlines() if line.startswith(("serving", "curl"))]


def test_a_stop_at_once_has_an_exit_code_and_does_not_close_what_runs(serve, monkeypatch):
    closed = []
    monkeypatch.setattr(LLM, "close", lambda self: closed.append(self))  # noqa: PLW0108
    assert serve().code == 0
    assert len(closed) == 1
    serve.seen.ends_well = False
    done = serve()
    assert done.code == 130
    assert done.err.splitlines()[-1] == "stopped at once"
    assert len(closed) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--port", "99999"], "port is an integer in [0, 65535]; got 99999"),
        (["--deadline", "0"], "deadline_s is a number of seconds above 0, or None; got 0.0"),
        (["--max-queue", "-1"], "max_queue is an integer >= 0; got -1"),
        (["--api-key", "short"], "an API key has at least 8 printable"),
        (["--cors-origin", "a.example"], "cors_origins is origins such as"),
        (["--log-format", "xml"], "log_format is text or json; got 'xml'"),
        (["--chat-template", "nowhere.jinja"], "chat-template file 'nowhere.jinja' cannot be read"),
        (["--max-requests", "0"], "max_requests is an integer >= 1; got 0"),
        (["--drafter", "nobody"], "unknown drafter 'nobody'"),
        (["--drain", "soon"], "'soon' is not a number"),
    ],
)
def test_errors_are_two_lines(serve, arguments, message):
    done = serve(*arguments)
    assert done.code == 2
    error, hint = done.err.splitlines()
    assert message in error
    assert (error[:7], hint[:6]) == ("error: ", "hint: ")


def test_an_address_in_use_is_found_before_the_model_is_loaded(serve, monkeypatch):
    monkeypatch.setattr("foretoken.cli.serve.load_llm", lambda *_, **__: pytest.fail("loaded"))
    with bind("127.0.0.1", 0) as listener:
        done = serve("--port", listener.getsockname()[1])
    assert done.code == 2
    assert "address already in use" in done.err


def test_a_model_that_cannot_be_loaded_leaves_the_port_free(serve, tmp_path):
    with bind("127.0.0.1", 0) as listener:
        port = listener.getsockname()[1]
    assert serve("--port", port, model=tmp_path).code == 2
    with socket.create_server(("127.0.0.1", port)):
        pass


def test_without_the_extra_one_line_says_what_to_install(serve, monkeypatch):
    monkeypatch.setattr(
        command, "find_spec", lambda name: None if name in ("fastapi", "structlog") else object()
    )
    done = serve()
    assert done.code == 2
    assert done.err.splitlines() == [
        "error: serve needs packages that are not installed: fastapi, structlog",
        "hint: pip install 'foretoken[server]'",
    ]


def test_the_page_names_every_option():
    text = PAGE.read_text(encoding="utf-8")
    serving = typer.main.get_command(app).commands["serve"]
    own = [
        option.opts[0]
        for option in serving.params
        if option.rich_help_panel in (command.SERVER_PANEL, command.LIMITS_PANEL)
    ]
    assert len(own) > 10
    assert [name for name in own if f"`{name}" not in text] == []
