"""Run a notebook with the Python that runs this, with other values in its forms than it shows.

    python scripts/run_notebook.py notebooks/trocr.ipynb WORK --values '{"LinesForm": {"images": "..."}}'

Every cell runs as it stands, the first one too. After a cell that makes a form, `NAME = show_...form(...)`, one more is
put in that types the values in: `--values` has them by the name of the form's function (`show_lines_form`) or of the
settings class that it is made of (`TeachConfig`); a name that this form has not is an error. An error in a cell ends
this with its traceback and exit status 1. The cells' outputs are written to WORK/NAME.run.ipynb.
"""

import argparse
import ast
import json
import os
import sys
from pathlib import Path
from typing import Any


def forms_of(source: str) -> dict[str, list[str]]:
    """Variable -> what its form is known by: the function that makes it, and the classes named in the call."""
    found = {}
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Call) and isinstance(node.targets[0], ast.Name):
            function = node.value.func
            name = function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")
            if name.startswith("show_") and name.endswith("form"):
                classes = [item.id for item in ast.walk(node.value) if isinstance(item, ast.Name)]
                found[node.targets[0].id] = [name, *classes]
    return found


def with_values(cells: list[str], values: dict[str, dict[str, Any]]) -> list[str]:
    """The cells, and after each that makes a form the one that types values in; an unused row of values is an error."""
    done, used = [], set()
    for source in cells:
        done.append(source)
        for variable, names in forms_of(_without_magics(source)).items():
            typed: dict[str, Any] = {}
            for name in names:
                typed |= values.get(name, {})
                used |= {name}
            if typed:
                done.append(f"{variable}.update(**{typed!r})")
    if unused := sorted(values.keys() - used):
        raise SystemExit(f"The notebook makes no form of {', '.join(unused)}.")
    return done


def _without_magics(source: str) -> str:
    lines = source.splitlines()
    return "\n".join(
        line[: len(line) - len(line.lstrip())] + "pass" if line.lstrip().startswith(("%", "!")) else line
        for line in lines
    )


def run(path: Path, work: Path, values: dict[str, dict[str, Any]], timeout_s: int) -> Path:
    """Run it in a kernel of this Python, in the folder WORK; returns the file with the outputs."""
    import nbformat
    from jupyter_client.kernelspec import KernelSpec
    from jupyter_client.manager import AsyncKernelManager
    from nbclient import NotebookClient

    class Here(AsyncKernelManager):
        """A kernel of this very Python, whatever kernels are registered for the user."""

        @property
        def kernel_spec(self) -> KernelSpec:
            return KernelSpec(argv=[sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"])

    notebook = nbformat.read(path, as_version=4)
    code = [cell.source for cell in notebook.cells if cell.cell_type == "code"]
    notebook.cells = [nbformat.v4.new_code_cell(source) for source in with_values(code, values)]
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    client = NotebookClient(
        notebook, kernel_manager_class=Here, timeout=timeout_s, resources={"metadata": {"path": str(work)}}
    )
    out = work / f"{path.stem}.run.ipynb"
    try:
        client.execute(env=environment)
    finally:
        nbformat.write(notebook, out)
    return out


def main() -> int:
    """Run one notebook."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("notebook", type=Path)
    parser.add_argument("work", type=Path)
    parser.add_argument("--values", type=json.loads, default={})
    parser.add_argument("--timeout-s", type=int, default=900, help="for one cell")
    chosen = parser.parse_args()
    chosen.work.mkdir(parents=True, exist_ok=True)
    print(run(chosen.notebook.resolve(), chosen.work.resolve(), chosen.values, chosen.timeout_s))
    return 0


if __name__ == "__main__":
    sys.exit(main())
