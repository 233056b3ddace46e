"""The notebook runs from top to bottom; needs the extra 'notebook'."""

from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.mark.gate
@pytest.mark.real
def test_the_tour(smollm2_path):
    nbformat, nbclient = map(pytest.importorskip, ("nbformat", "nbclient"))
    tour = nbformat.read(EXAMPLES / "tour.ipynb", as_version=4)
    where = {"metadata": {"path": str(EXAMPLES)}}
    nbclient.NotebookClient(tour, timeout=600, resources=where).execute()
    printed = [out["text"] for out in tour.cells[-1].outputs if out.get("name") == "stdout"]
    lines = "".join(printed).splitlines()
    decoders = ["lookup", "chain", "tree", "both", "own"]
    assert [line.partition(":")[0].strip() for line in lines] == decoders
    assert "tokens a round with 8 nodes" in lines[0]
