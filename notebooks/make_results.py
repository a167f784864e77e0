"""results.ipynb from results.py: the source as cells, executed from top to bottom.

    python notebooks/make_results.py

In the source a line `# %%` begins a code cell, `# %% [markdown]` one of text, each line of which is
a comment. The notebook holds no time, version or path: the same results give the same file, but for
what matplotlib draws differently.
"""

import os
from pathlib import Path

import nbclient
import nbformat
from nbformat import NotebookNode

FOLDER = Path(__file__).parent
SOURCE, NOTEBOOK = FOLDER / "results.py", FOLDER / "results.ipynb"


def unexecuted(source: str) -> NotebookNode:
    """The notebook of a source in the percent format, without outputs."""
    cells = []
    for i, block in enumerate(("\n" + source).split("\n# %%")[1:]):
        kind, _, text = block.partition("\n")
        if kind.strip() == "[markdown]":
            lines = [line.removeprefix("#").removeprefix(" ") for line in text.strip().split("\n")]
            cells.append(nbformat.v4.new_markdown_cell("\n".join(lines)))
        else:
            cells.append(nbformat.v4.new_code_cell(text.strip()))
        cells[-1]["id"] = f"cell-{i}"  # else a random one
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    return nbformat.v4.new_notebook(
        cells=cells, metadata={"kernelspec": kernel, "language_info": {"name": "python"}}
    )


def executed(notebook: NotebookNode, folder: Path = FOLDER) -> NotebookNode:
    """A copy of it, executed in `folder`. Raises `nbclient.exceptions.CellExecutionError`."""
    copy = nbformat.from_dict(notebook)
    client = nbclient.NotebookClient(
        copy,
        timeout=120,
        kernel_name="python3",
        resources={"metadata": {"path": str(folder)}},
        record_timing=False,
    )
    # a library's warning would bring the path of its file into the notebook
    client.execute(env={**os.environ, "PYTHONWARNINGS": "ignore:IProgress not found"})
    copy["metadata"] = notebook["metadata"]
    return copy


def main() -> None:
    notebook = executed(unexecuted(SOURCE.read_text()))
    nbformat.write(notebook, NOTEBOOK)
    print(
        f"{NOTEBOOK.name}: {len(notebook['cells'])} cells, {NOTEBOOK.stat().st_size / 1e3:.0f} kB"
    )


if __name__ == "__main__":
    main()
