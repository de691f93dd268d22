"""Tokens stay out of messages, and off unencrypted lines."""

import os
import subprocess
import sys
import urllib.parse
from pathlib import Path

import huggingface_hub
import pytest

from conam_zoo.release.publish import publish
from conam_zoo.weights.credentials import check_endpoint, redact, tells_secrets, token_in_use, token_to_send
from conam_zoo.weights.errors import HubError, WeightsError


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
    if openly:
        with pytest.raises(HubError, match="unencrypted"):
            check_endpoint()
    else:
        check_endpoint()
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    check_endpoint()


@pytest.mark.parametrize(
    "endpoint", ["http://[::1", "not an address", "ftp://hub.example", "https://", "https://hub.example:port", ""]
)
def test_a_malformed_endpoint_is_one_sentence(endpoint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", endpoint)
    with pytest.raises(HubError, match=r"HF_ENDPOINT is .* no address of a Hub"):
        check_endpoint()


@pytest.mark.parametrize("endpoint", ["http://me:secret@[::1", "https://me:secret@host:99999", "https://me:secret"])
def test_an_endpoint_that_the_client_cannot_be_imported_with_is_one_sentence(endpoint: str) -> None:
    command = [sys.executable, "-m", "conam_zoo", "list"]
    done = subprocess.run(command, env={**os.environ, "HF_ENDPOINT": endpoint}, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr == "conam: HF_ENDPOINT is no address of a Hub: give one such as https://huggingface.co.\n"


@pytest.mark.parametrize("password", ["pa/ss@word", "p@ss:word", "pässword", "pass%2Fword", "pass'word"])
@pytest.mark.parametrize("form", ["https://me:{}@hub.example", "me:{}@hub.example", "http://me:{}@[::1"])
def test_a_password_in_the_endpoint_is_never_told(password: str, form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    endpoint = form.format(password)
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", endpoint)
    for spelled in (password, urllib.parse.quote(password, safe=""), urllib.parse.unquote(password)):
        shown = redact(f"{endpoint} {spelled!s} cannot be reached at {endpoint}/x/y")
        assert password not in shown
        assert "word" not in shown


@pytest.mark.parametrize("kind", ["folder", "pipe", "binary"])
def test_a_token_file_that_cannot_be_read_is_left_out_with_a_warning(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "token"
    {"folder": path.mkdir, "pipe": lambda: os.mkfifo(path), "binary": lambda: path.write_bytes(b"\xff\xfe")}[kind]()
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(path))
    assert token_in_use() is None
    assert redact("as it is") == "as it is"
    (warning,) = caplog.records
    assert f"The token file {path} is not used" in warning.message


def test_no_token_is_sent_unasked_where_huggingface_hub_would_send_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://mirror.lan")
    assert token_to_send() == token_in_use() == "my own secret"
    with pytest.raises(HubError, match="would send the token in use unencrypted"):
        check_endpoint()
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_IMPLICIT_TOKEN", True)
    assert token_to_send() is None
    check_endpoint()


def test_publishing_takes_a_token_that_may_be_sent(monkeypatch: pytest.MonkeyPatch, checkout: Path) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_ofSomeLab")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_IMPLICIT_TOKEN", True)
    options = {"namespace": "some-lab", "card": lambda entry: "", "tag": "v1", "onnx": "none"}
    with pytest.raises(WeightsError, match="leave HF_HUB_DISABLE_IMPLICIT_TOKEN unset"):
        publish(["resnet20_conam.cifar10"], manifest_path=checkout / "weights_manifest.json", **options)
