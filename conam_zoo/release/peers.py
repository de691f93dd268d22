"""Accuracies that others publish for the same backbones, from ``peers.toml``."""

import tomllib
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any

__all__ = ["Peer", "best_peer", "like_for_like"]


@dataclass(frozen=True)
class Peer:
    """One published figure.

    Attributes:
        top1_percent: On the test images.
        epoch: ``"last"``, ``"best"`` (chosen on the test images) or ``"not stated"``.
        source: Who published it.
        url: Where.
        usual: Whether it is the usual recipe of its backbone: crops and flips, 200 to 300 epochs.
        with_: An attention or a training method; ``""`` for the plain net.
    """

    top1_percent: float
    epoch: str
    source: str
    url: str
    usual: bool = False
    with_: str = ""

    def to_markdown(self) -> str:
        """The figure with its kind and a link to its source."""
        kind = "epoch not stated" if self.epoch == "not stated" else f"{self.epoch} epoch"
        having = f", with {self.with_}" if self.with_ else ""
        return f"{self.top1_percent:.2f} % ({kind}, [{self.source}]({self.url}){having})"


@cache
def _document() -> dict[str, Any]:
    return tomllib.loads(files("conam_zoo.release").joinpath("peers.toml").read_text(encoding="utf-8"))


def _peers(arch: str, dataset: str) -> list[Peer]:
    document = _document()
    figures = document.get(arch.removesuffix("_conam"), {}).get(dataset, [])
    return [
        Peer(
            top1_percent=figure["top1_percent"],
            epoch=figure["epoch"],
            source=figure["source"],
            url=document["sources"][figure["source"]],
            usual=figure.get("usual", False),
            with_=figure.get("with", ""),
        )
        for figure in figures
    ]


def best_peer(arch: str, dataset: str) -> Peer | None:
    """The highest figure known for the backbone of ``arch``, with any recipe or attention; None if none is known."""
    return max(_peers(arch, dataset), key=lambda peer: peer.top1_percent, default=None)


def like_for_like(arch: str, dataset: str) -> Peer | None:
    """The usual recipe's figure for the backbone of ``arch``: that of its last epoch where it is known, as ours is."""
    usual = [peer for peer in _peers(arch, dataset) if peer.usual]
    return min(usual, key=lambda peer: ("last", "not stated", "best").index(peer.epoch), default=None)
