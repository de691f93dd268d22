"""The picture of a model card: two photographs, what the net makes of them, and its confidence maps."""

from pathlib import Path

from conam_zoo.models.registry import open_model
from conam_zoo.visualize.predict import predict
from conam_zoo.visualize.sheet import draw_sheet

__all__ = ["draw_card_picture"]

# Both are CC0, so that a card may carry them; see examples/photos/LICENSES.md.
PHOTOGRAPHS = ("bird.jpg", "cat.jpg")


def draw_card_picture(folder: Path, photographs: Path) -> Path:
    """Write ``confidence.png`` beside the weights of a folder.

    Args:
        folder: ``weights/<name>`` of a checkout.
        photographs: The folder of the example photographs.

    Raises:
        UserError: If a photograph is missing or the picture cannot be written.
    """
    picture = folder / "confidence.png"
    predictions = predict(open_model(f"local-dir:{folder}"), [photographs / name for name in PHOTOGRAPHS])
    draw_sheet(predictions, picture, title=folder.name)
    return picture
