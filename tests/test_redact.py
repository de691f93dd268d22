"""Tokens stay out of messages, and off unencrypted lines."""

import huggingface_hub
import pytest

from conam_zoo.weights.redact import redact, tells_secrets, token_would_travel_openly


@pytest.fixture(autouse=True)
def token(monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("HF_TOKEN", "my own secret")
    return "my own secret"


@pytest.mark.parametrize(
    ("text", "redacted"),
    [
        ("sent my own secret along", "sent *** along"),
        ("token hf_abcDEF0123456789, used", "token ***, used"),
        ("Illegal header value b'Bearer xyz\\x01'", "Illegal header value b'Bearer ***'"),
        ("https://me:word@hub.example/x", "https://***@hub.example/x"),
        (
            "HF_ENDPOINT, HF_TOKEN and hf_hub_download are no tokens",
            "HF_ENDPOINT, HF_TOKEN and hf_hub_download are no tokens",
        ),
    ],
)
def test_what_looks_like_a_token_is_replaced(text: str, redacted: str) -> None:
    assert redact(text) == redacted


def test_a_cause_is_looked_into() -> None:
    outer = RuntimeError("nothing to see")
    assert not tells_secrets(outer)
    outer.__cause__ = ValueError("my own secret")
    assert tells_secrets(outer)
    assert not tells_secrets(None)


@pytest.mark.parametrize(
    ("endpoint", "openly"),
    [
        ("https://huggingface.co", False),
        ("http://127.0.0.1:8000", False),
        ("http://localhost", False),
        ("http://[::1]:80", False),
        ("http://mirror.example", True),
        ("http://127.0.0.1.example", True),
    ],
)
def test_only_plain_http_to_another_machine_is_open(
    endpoint: str, openly: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", endpoint)
    assert token_would_travel_openly() is openly
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    assert not token_would_travel_openly()
