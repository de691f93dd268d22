"""The page of ``conam demo``: a picture, one net or two, five classes, and the confidences of each ConAM."""

import base64
import importlib.util
import io
import os
import signal
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.colors import to_hex
from numpy.typing import NDArray
from packaging.version import Version
from PIL import Image

from conam_zoo.deploy.runtime import open_classifier
from conam_zoo.errors import UserError
from conam_zoo.escape import for_html
from conam_zoo.layers.confidence import Patch, has_confidence
from conam_zoo.models import StagedClassifier
from conam_zoo.visualize.plots import COLOURS, colour_scale, relative
from conam_zoo.visualize.predict import (
    Prediction,
    class_names,
    edges,
    percent,
    pictures_in,
    predict_each,
    split_transform,
)
from conam_zoo.weights import WeightsError, find_checkout, load_manifest
from conam_zoo.weights.manifest import EVEN

SIDE = 384  # pixels of the picture under a map
DECODED = 1024  # pixels of the longer side to which a photograph is scaled down
GRADIO = "6.31"  # or newer
NO_NET, NO_SITE = "nothing", -1
FADE = "strength => { document.documentElement.style.setProperty('--strength', strength) }"  # no round trip

INTRODUCTION = """# Try a ConAM net
Drop, paste or photograph a picture. The map shows how a ConAM in the net spreads its confidence over the patches:
orange ones have more than an even share, purple ones less.
"""


def build_page(model: str | None = None, photographs: Path | None = None) -> Any:
    """The page, a ``gradio.Blocks``: ``build_page().launch(**look())`` starts it.

    ``model`` is chosen first, what ``open_classifier`` opens or the most accurate net; ``photographs`` is a folder of
    pictures to begin with.
    """
    if importlib.util.find_spec("gradio") is None or Version(version("gradio")) < Version(GRADIO):
        raise UserError(f"The page needs gradio: pip install 'gradio>={GRADIO}'.")
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read while it is imported
    import gradio as gr

    entries = load_manifest().entries
    nets = sorted(entries, key=lambda name: -entries[name].metrics.top1_percent)
    if model is not None and model not in nets:
        nets.insert(0, model)
    if not nets:
        raise UserError("The manifest has no weights: name a model, such as local-dir:FOLDER.")
    opened, turn = lru_cache(maxsize=4)(open_classifier), threading.Lock()  # maps are read by hooks on a net
    first = model or nets[0]
    choices = _site_choices(opened(first))
    pictures = list(map(str, pictures_in(photographs))) if photographs else []

    def show(path: str | None, net: str, other: str, site: int) -> tuple[str, Any]:
        if path is None:
            return '<p class="note">Choose a picture; what a net makes of it stands here.</p>', gr.skip()
        if not Path(path).is_file():
            return (
                '<p class="problem" role="alert">The picture was cleared after an hour: choose it again.</p>',
                gr.skip(),
            )
        try:
            with turn:
                chosen = {name: opened(name) for name in (net, other) if name != NO_NET}
                html = _results(Path(path), chosen, site)
        except (UserError, WeightsError) as error:
            return f'<p class="problem" role="alert">{_about(path, error)}</p>', gr.skip()
        choices = _site_choices(chosen[net])
        last = choices[-2:][0][1]
        # A value would undo what was chosen in the meantime.
        return html, gr.Radio(choices) if site <= last else gr.Radio(choices, value=last)

    with gr.Blocks(title="conam_zoo", analytics_enabled=False, delete_cache=(600, 3600)) as page:
        gr.Markdown(INTRODUCTION)
        with gr.Row():
            with gr.Column(scale=2, min_width=280):
                picture = gr.Image(
                    next(iter(pictures), None),
                    sources=["upload", "clipboard", "webcam"],
                    type="filepath",
                    label="Picture",
                    height=300,
                    buttons=[],
                )
                # Gradio would open it in formats that are not read here, and has no sentence for what is broken.
                picture.preprocess = lambda payload: payload and payload.path
                if pictures:
                    gr.Examples([[each] for each in pictures], picture, label="To begin with", cache_examples=False)
                net = gr.Dropdown(nets, value=first, label="Net", filterable=False)
                other = gr.Dropdown([NO_NET, *nets], value=NO_NET, label="Compare with", filterable=False)
            with gr.Column(scale=3, min_width=280):
                with gr.Row():
                    site = gr.Radio(choices, value=choices[-2:][0][1], label="Confidences of", scale=2, min_width=260)
                    strength = gr.Slider(0, 1, 0.6, step=0.05, label="Overlay", scale=1, min_width=170, buttons=[])
                results = gr.HTML()
        gr.on(
            [page.load, picture.change, net.input, other.input, site.input],
            show,
            [picture, net, other, site],
            [results, site],
            trigger_mode="always_last",
            show_progress="hidden",
            api_visibility="private",
        )
        strength.change(None, strength, js=FADE)
    return page


def look() -> dict[str, Any]:
    """How the page is launched: its looks, and neither telemetry nor anything loaded from elsewhere."""
    import gradio as gr

    return {
        "theme": gr.themes.Base(primary_hue="orange", neutral_hue="stone", font=["system-ui", "sans-serif"]),
        "css_paths": [Path(__file__).with_name("demo.css")],
        "footer_links": [],
        "run_history": False,
        "share": False,
        "ssr_mode": False,
        "max_file_size": "200mb",
    }


def serve(model: str | None, host: str, port: int | None, say: Callable[[str], object]) -> None:
    """Serve the page until Ctrl-C; pictures are kept in a folder that goes with it."""
    _check_address(host, port or 0)
    checkout = find_checkout()
    with tempfile.TemporaryDirectory(prefix="conam-demo-") as folder:
        os.environ["GRADIO_TEMP_DIR"] = folder
        page = build_page(model, checkout and checkout / "examples" / "photos")
        _, url, _ = page.launch(server_name=host, server_port=port, prevent_thread_lock=True, quiet=True, **look())
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))  # the pictures go then too
        try:
            say(f"The page is at {url} until Ctrl-C.")
            while True:
                time.sleep(1)  # on Windows, Ctrl-C does not end a wait for an event
        finally:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)  # a second one would leave them
            page.close(verbose=False)


def _check_address(host: str, port: int) -> None:
    """Refuse what cannot be listened on; Gradio would try it for minutes, with tracebacks."""
    try:
        family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        socket.create_server(address, family=family).close()
    except (OSError, UnicodeError) as error:
        at = f"{host}, port {port}" if port else host
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"The page cannot be served at {at} ({reason}): choose another --host or --port.") from error


def _about(path: str, message: object) -> str:
    """A message as HTML, in which the picture has the name that its owner knows."""
    return for_html(str(message).replace(path, Path(path).name))


def _site_choices(net: StagedClassifier) -> list[tuple[str, int]]:
    """The sites of a net by name and number, none of them at the end."""
    names = [_short(name) for name, module in net.named_modules() if has_confidence(module)]
    return [*((name, number) for number, name in enumerate(names)), ("none", NO_SITE)]


def _results(path: Path, nets: dict[str, StagedClassifier], site: int) -> str:
    """What nets make of a picture, as HTML."""
    notes: list[str] = []
    predictions = [next(predict_each(net, [path], side=DECODED, say=notes.append)) for net in nets.values()]
    maps = [each.numpy() for prediction in predictions for each in prediction.maps.values()]
    largest = max((float(relative(each).max()) for each in maps), default=1.0)
    panels = [
        _panel(name, net, prediction, site, largest)
        for (name, net), prediction in zip(nets.items(), predictions, strict=True)
    ]
    note = f'<p class="note">{_about(str(path), notes[0])}</p>' if notes else ""
    return f'{note}<div class="nets">{"".join(panels)}</div>'


def _short(site: str) -> str:
    return site.removesuffix(".attn")


def _panel(name: str, net: StagedClassifier, prediction: Prediction, site: int, largest: float) -> str:
    sites = list(prediction.maps)
    chosen = sites[min(site, len(sites) - 1)] if sites and site != NO_SITE else None
    drawn = ("", "")
    if chosen:
        drawn = _map(_short(chosen), prediction.maps[chosen].numpy(), largest, prediction.patches[chosen])
    size = prediction.seen.size
    sharp = split_transform(net, max(1, SIDE // max(size)))[0](_shown_part(prediction.image, net))
    known = class_names(net)
    words = ", ".join(known) if len(known) <= 12 else f"{len(known)} classes"
    bars = "".join(
        f"<li><span>{for_html(label.replace('_', ' '))}</span><span>{for_html(percent(share))}</span>"
        f'<i style="--share: {share:.2%}"></i></li>'
        for label, share in prediction.top
    )
    return f"""<article><h2>{for_html(name)}</h2><ol>{bars}</ol>
<figure><div class="picture {"mapped" if chosen else ""}"><img src="{_address(sharp, "JPEG")}" alt="">{drawn[0]}</div>
{drawn[1]}<figcaption><img src="{_address(prediction.seen, "PNG")}" alt="">
<span>The net sees {size[0]} x {size[1]} pixels and knows {for_html(words)}.</span></figcaption></figure></article>"""


def _shown_part(image: Image.Image, net: StagedClassifier) -> Image.Image:
    """What the net is shown of a picture, or a little more; a strip enlarged as a whole would fill the memory."""
    cfg = net.pretrained_cfg
    if cfg.get("crop_mode") in ("squash", "border"):  # the whole picture, which does not grow beyond the net's shape
        return image
    shape = cfg["input_size"][:0:-1]
    scale = min(length / wanted for length, wanted in zip(image.size, shape, strict=True))
    sides = [max(1, round(scale * wanted)) for wanted in shape]
    left, top = ((length - side) // 2 for length, side in zip(image.size, sides, strict=True))
    return image.crop((left, top, left + sides[0], top + sides[1]))


def _map(site: str, confidence: NDArray[np.float32], largest: float, patch: Patch) -> tuple[str, str]:
    """A confidence map as SVG in the colours of ``draw_map``, and the scale below it."""
    scale = colour_scale(largest)

    def colour(times: float) -> str:
        return to_hex(colormaps[COLOURS](float(scale(times))))

    rows, columns = confidence.shape
    y, x = ([count * edge for edge in edges(count, share)] for count, share in zip((rows, columns), patch, strict=True))
    patches = "".join(
        f'<rect x="{x[column]:g}" y="{y[row]:g}" width="{x[column + 1] - x[column]:g}" '
        f'height="{y[row + 1] - y[row]:g}" fill="{colour(float(times))}"/>'
        for (row, column), times in np.ndenumerate(relative(confidence))
    )
    numbers = "".join(
        f'<text x="{(x[column] + x[column + 1]) / 2:g}" y="{(y[row] + y[row + 1]) / 2:g}">{100 * share:.1f}</text>'
        for (row, column), share in np.ndenumerate(confidence if max(rows, columns) <= 8 else confidence[:0])
    )
    top, mean = float(scale.vmax or 1), float(confidence.mean())
    ramp = ", ".join(colour(top * step / 20) for step in range(21))
    word = "even share" if abs(confidence.sum() - 1) < 1e-3 else "mean"
    even = "; nearly the same everywhere" if confidence.std() < EVEN * mean else ""
    title = f"Confidence of {for_html(site)} in percent{even}"
    return (
        f'<svg viewBox="0 0 {columns} {rows}" preserveAspectRatio="none" role="img" aria-label="{title}">'
        f"<g>{patches}</g><g>{numbers}</g></svg>",
        f'<div class="scale" style="--even: {1 / top:.2%}"><p>{title}</p>'
        f'<div style="background: linear-gradient(to right, {ramp})"><b></b></div><p>{word} {mean:.2%}</p></div>',
    )


def _address(image: Image.Image, kind: str) -> str:
    """A picture as a data: address."""
    buffer = io.BytesIO()
    image.save(buffer, kind)
    return f"data:image/{kind.lower()};base64,{base64.b64encode(buffer.getvalue()).decode()}"
