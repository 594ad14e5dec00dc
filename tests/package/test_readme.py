"""The README stays short, its numbers are those of `benchmarks/results`, and links of all documents lead somewhere."""

import re
from pathlib import Path

import pytest

import entrocraft_trl
from entrocraft_trl import tasks


ROOT = Path(__file__).parents[2]
README = ROOT / "README.md"
DOCUMENTS = [
    *ROOT.glob("*.md"),
    *(ROOT / folder / "README.md" for folder in ("benchmarks", "configs", "configs/compare")),
]


def anchors(document: Path) -> set[str]:
    """Of the headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", document.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_it_has_at_most_900_words():
    assert len(README.read_text(encoding="utf-8").split()) <= 900


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(document):
    for link in re.findall(r"\]\((?!https?:)([^)]+)\)", document.read_text(encoding="utf-8")):
        path, _, anchor = link.partition("#")
        target = document.parent / path if path else document
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


def test_its_table_is_that_of_the_committed_run():
    results = (ROOT / "benchmarks" / "results" / "quickstart.md").read_text(encoding="utf-8").splitlines()
    committed = [cells(line)[1:-1] for line in results if line.startswith("|")]  # but for names and seconds
    table = README.read_text(encoding="utf-8").partition("| policy |")[2].partition("\n\n")[0].splitlines()
    assert [cells(line)[1:] for line in table[2:]] == committed[2:]


def test_its_diff_is_python_with_names_and_fields_that_exist(tmp_path):
    lines = README.read_text(encoding="utf-8").partition("```diff\n")[2].partition("```")[0].splitlines()
    code = "\n".join(line[1:] for line in lines if not line.startswith("-"))
    built = {}

    def trainer(**arguments):
        built.update(arguments)
        return type("Trainer", (), {"train": lambda self: None})()

    names = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(entrocraft_trl, "EntrocraftGRPOTrainer", trainer, raising=False)
        patch.setattr(tasks, "starting_policy", lambda: tmp_path)
        exec(code, names)
    assert built["args"].rejection_rule == "entropy_change" and built["args"].max_steps == 100
    assert len(built["train_dataset"]) == 4096
