"""Rewriting what is generated from the manifest: the README's result table, model cards, heads of recipes."""

from pathlib import Path

from conam_zoo.errors import UserError
from conam_zoo.files import write_text
from conam_zoo.training.card import model_card, recipe_head, result_table
from conam_zoo.weights import find_checkout, load_manifest

__all__ = ["generated_files", "rewrite_tables"]

BEGIN, END = "<!-- results: written by `conam tables` -->\n", "<!-- end of results -->\n"


def generated_files(checkout: Path) -> dict[Path, str]:
    """What each generated file of a checkout has to hold."""
    manifest = load_manifest(checkout / "weights_manifest.json")
    readme = (checkout / "README.md").read_text(encoding="utf-8")
    before, begin, rest = readme.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise UserError(f"{checkout / 'README.md'} has no place for the results: put the lines {BEGIN}{END} back.")
    files = {checkout / "README.md": before + begin + "\n" + result_table(manifest) + "\n" + end + after}
    for name, entry in manifest.entries.items():
        files[checkout / "weights" / name / "README.md"] = model_card(entry, manifest)
    for path in sorted((checkout / "conam_zoo" / "training" / "recipes").glob("*.toml")):
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
        body = "".join(line for line in lines if not line.startswith("#"))
        files[path] = recipe_head(path.stem, manifest) + body
    return files


def rewrite_tables() -> list[Path]:
    """Rewrite the generated files that are out of date; returns their paths."""
    checkout = find_checkout()
    if checkout is None:
        raise UserError("The tables are those of a checkout of conam_zoo: run from one.")
    changed = []
    for path, text in generated_files(checkout).items():
        if not path.is_file() or path.read_text(encoding="utf-8") != text:
            write_text(path, text)
            changed.append(path)
    return changed
