"""The page of ``conam demo`` as a Space of the Hugging Face Hub."""

from pathlib import Path

from conam_zoo.deploy.demo import build_page, look

here = Path(__file__).parent
page = build_page(photographs=next(folder for folder in (here / "photos", here.parent / "photos") if folder.is_dir()))

if __name__ == "__main__":
    page.launch(**look())
