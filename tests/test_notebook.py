"""The notebook: run from top to bottom with fewer epochs, and what of it is committed.

``jupyter execute --inplace examples/finetune.ipynb`` makes the committed outputs.
"""

import json
import re
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient
from nbformat import NotebookNode


@pytest.fixture
def notebook(checkout: Path) -> NotebookNode:
    return nbformat.read(checkout / "examples" / "finetune.ipynb", as_version=4)


def code(notebook: NotebookNode) -> list[NotebookNode]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def kinds(cell: NotebookNode) -> set[str]:
    """What a cell puts out: the best form of each output, or the stream that it is written to."""
    ranked = ("image/png", "text/markdown", "text/html", "text/plain")
    return {
        next(form for form in ranked if form in output.data) if "data" in output else output.get("name", "error")
        for output in cell.outputs
    }


def test_its_outputs_are_committed_without_paths_of_a_machine(notebook: NotebookNode, checkout: Path) -> None:
    assert [cell.execution_count for cell in code(notebook)] == list(range(1, 11))
    assert set.union(*map(kinds, code(notebook))) == {"image/png", "text/markdown", "stdout"}
    text = (checkout / "examples" / "finetune.ipynb").read_text(encoding="utf-8")
    words = re.sub(r'"image/png": "[^"]*"', "", text)
    assert not re.search(r"/(root|home|work|tmp|usr|opt|Users)\b|[A-Z]:\\\\", words)
    for target in re.findall(r"\]\(([^)#]+)", words):
        assert (checkout / "examples" / target).exists(), f"the notebook links to {target}"


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_it_runs_from_top_to_bottom(notebook: NotebookNode, tmp_path: Path) -> None:
    committed = [kinds(cell) for cell in code(notebook)]
    (place,) = [i for i, cell in enumerate(notebook.cells) if "parameters" in cell.metadata.get("tags", [])]
    notebook.cells.insert(place + 1, nbformat.v4.new_code_cell("epochs = 2"))
    NotebookClient(notebook, timeout=500, resources={"metadata": {"path": str(tmp_path)}}).execute()
    del notebook.cells[place + 1]
    assert [kinds(cell) for cell in code(notebook)] == committed
    (shown,) = [
        output.data["text/markdown"]
        for cell in code(notebook)
        for output in cell.outputs
        if "text/markdown" in output.get("data", ())
    ]
    report = json.loads((tmp_path / "runs" / "my_pictures" / "report.json").read_text(encoding="utf-8"))
    assert shown.startswith(f"**{report['top1_percent']:.1f} %** of 80 pictures")
