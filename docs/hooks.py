"""What the site has beside the pages of this folder: tutorials, which are scripts, as pages and notebooks."""

from pathlib import Path

import jupytext
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add each tutorial as a page, and as a notebook to take along beside its script."""
    for path in sorted((ROOT / "docs" / "tutorials").glob("*.py")):
        notebook = jupytext.reads(path.read_text(encoding="utf-8"), fmt="py:percent")
        taken = f"\n\n---\nTake it along: [notebook]({path.stem}.ipynb), [script]({path.name}). The tests execute it.\n"
        page, whole = page_of(notebook) + taken, jupytext.writes(notebook, fmt="ipynb")
        files.append(File.generated(config, f"tutorials/{path.stem}.md", content=page))
        files.append(File.generated(config, f"tutorials/{path.stem}.ipynb", content=whole))
    return files


def page_of(notebook: object) -> str:
    """Return a notebook as Markdown."""
    cells = [
        cell.source if cell.cell_type == "markdown" else f"```python\n{cell.source}\n```"
        for cell in notebook.cells  # type: ignore[attr-defined]
    ]
    return "\n\n".join(cells)
