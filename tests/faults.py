"""Every fault between a user and a file of weights, and what it ends in; `docs/faults.md` is written from this list.

`python tests/faults.py` writes it. The tests of `test_hub_faults.py` run the list.
"""

from dataclasses import dataclass
from pathlib import Path

PAGE = Path(__file__).resolve().parents[1] / "docs" / "faults.md"
RIGHT_WEIGHTS = ""

INTRODUCTION = """# What every fault ends in

Each row is a test against a server that speaks the Hub's protocol: the load ends in the right weights or in one
sentence, quoted in part, within ten seconds (a lock held by another process is waited for up to a minute). It never
ends in wrong weights, and the same cache gives the right weights as soon as the fault is gone. Nothing is left behind
but what a killed process had fetched, which the next download after an hour removes. This page is written by `python
tests/faults.py` from the list that the tests run.

Two things are not covered: `timm.create_model("hf-hub:...")` fetches `config.json` itself, with huggingface_hub's own
client, before our code runs (the `conam` commands fetch it first and pin the commit); and the Hub's Xet transport
is not used, since files come by plain HTTP.
"""


@dataclass(frozen=True)
class Fault:
    """A fault, how to cause it, and what it ends in.

    Args:
        name: What goes wrong, as the page says it.
        says: A part of the sentence that it ends in; empty if it ends in the right weights.
        mode: The mode of the server.
        scene: Which test causes it; `load` is a pretrained load through an empty cache.
    """

    name: str
    says: str = RIGHT_WEIGHTS
    mode: str = "ok"
    scene: str = "load"


FAULTS = [
    Fault("The connection is refused", "could not be fetched", scene="refused"),
    Fault("The host's name cannot be resolved", "could not be fetched", scene="unresolved"),
    Fault("The host accepts the connection and is silent", "could not be fetched", "silent"),
    Fault("The host stalls in the middle of the file", "no answer within 8 seconds", "stalled"),
    Fault("Offline mode is set and the cache is empty", "HF_HUB_OFFLINE is set", scene="offline"),
    Fault("Status 500, once, when asked about the file", mode="500-once"),
    Fault("Status 500, once, when asked for the file", mode="500-once-on-get"),
    Fault("Status 500, always", "answered with status 500", "500"),
    Fault("Status 503, always", "answered with status 503", "503"),
    Fault("No such repository", "the Hub has no repository", "no-repository"),
    Fault("No such revision", "has no revision", "no-revision"),
    Fault("No such file", "has no file model.safetensors", "no-file"),
    Fault("A gated repository", "wants its terms accepted first, and a token", "gated"),
    Fault("An expired token", "does not accept the token in use, so renew it or log out", "expired-token"),
    Fault("An answer that is not a Hub's, as of a login page", "is not a Hub (no ETag)", "no-etag"),
    Fault("The body is cut in the middle, once", mode="cut-once"),
    Fault("The body is cut in the middle, always", "could not be fetched", "cut"),
    Fault("The body is shorter than announced", "and had announced", "short"),
    Fault("The Hub announces another file", "offers another model.safetensors", "other-etag"),
    Fault("The ETag is a path, absolute, empty or no hash; the commit is a path", "is not a Hub", scene="lies"),
    Fault("The body goes on beyond the announced size", "sends more of", "endless"),
    Fault("The body is packed, and swells to 100 MB", "compressed, although it was asked not to", "gzip"),
    Fault("The body comes a byte at a time", "too slowly", "drip"),
    Fault("The lock is held by a process that was stopped", scene="stopped process"),
    Fault("The body is corrupt and of the right size, once", mode="corrupt-once"),
    Fault("The body is corrupt and of the right size, always", "delivered another file", "corrupt-always"),
    Fault("The copy in the cache is corrupt", scene="corrupt cache"),
    Fault("The copy in the cache is corrupt, and the Hub is away", "is not the published file", "500", "corrupt cache"),
    Fault("A safetensors file whose header is truncated", "is not a safetensors file", scene="truncated header"),
    Fault("A safetensors file whose header claims 2^62 bytes", "is not a safetensors file", scene="huge header"),
    Fault("A pickle in place of safetensors", "is not a safetensors file", scene="pickle"),
    Fault("A safetensors file of another architecture", "These weights do not fit resnet20_conam", scene="other net"),
    Fault("A file with another number of classes", "have 7 classes and its configuration says", scene="classes"),
    Fault("The disk is full", "No space left on device", scene="full disk"),
    Fault("The cache is read-only and empty", "Permission denied", scene="read-only cache"),
    Fault("The cache is read-only and has the file", scene="read-only full cache"),
    Fault("The process is killed with SIGKILL in the middle of a download, at 20 random moments", scene="killed"),
    Fault("Eight processes at first use at once; the file is downloaded once", scene="eight at once"),
    Fault("A manifest with a path that climbs out of the cache", "must be a bare file name", scene="climbing path"),
    Fault("A manifest with an http:// address for a name", "must be", scene="http in manifest"),
    Fault("An http:// endpoint on another machine while a token is in use", "unencrypted", scene="open token"),
    Fault("A symbolic link in the mirror that leads to the right file", scene="link to right file"),
    Fault("A symbolic link in the mirror that leads to another file, a device, itself or nowhere", scene="other links"),
]

# The same through `hf-hub:owner/name`, a repository of the caller's choice whose config.json states the hash.
FOLDER_FAULTS = [
    Fault("The connection is refused", "could not be fetched", scene="refused"),
    Fault("The host accepts the connection and is silent", "could not be fetched", "silent"),
    Fault("The host stalls in the middle of the file", "no answer within 8 seconds", "stalled"),
    Fault("Status 500, once, when asked about the file", mode="500-once"),
    Fault("Status 500, always", "answered with status 500", "500"),
    Fault("No such repository", "the Hub has no repository", "no-repository"),
    Fault("A gated repository", "wants its terms accepted first, and a token", "gated"),
    Fault("An expired token", "does not accept the token in use, so renew it or log out", "expired-token"),
    Fault("The ETag is a path, absolute, empty or no hash; the commit is a path", "is not a Hub", scene="lies"),
    Fault("The body goes on beyond the announced size", "sends more of", "endless"),
    Fault("The body is packed, and swells to 100 MB", "compressed, although it was asked not to", "gzip"),
    Fault("The copy of the weights in the cache is corrupt", scene="corrupt cache"),
    Fault("The copy of config.json in the cache was damaged or altered", scene="corrupt config"),
]


def render() -> str:
    """The page, in Markdown."""
    parts = [INTRODUCTION]
    for title, faults in (
        ("Published weights, by name", FAULTS),
        ("A repository of the caller's, by `hf-hub:`", FOLDER_FAULTS),
    ):
        parts.append(f"## {title}\n\n| fault | ends in |\n| --- | --- |\n")
        parts[-1] += "".join(
            f"| {fault.name} | {f'one sentence: “… {fault.says} …”' if fault.says else 'the right weights'} |\n"
            for fault in faults
        )
    return "\n".join(parts)


if __name__ == "__main__":
    PAGE.parent.mkdir(exist_ok=True)
    PAGE.write_text(render(), encoding="utf-8")
