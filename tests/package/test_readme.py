"""The README stays short, its numbers are those of `benchmarks/results`, and links of all documents lead somewhere."""

import json
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


def committed_tables() -> tuple[dict[str, list[str]], dict[str, list[str]]]:
    """What the README quotes of each policy: of the quickstart, and of the comparison on the real model."""
    results = ROOT / "benchmarks" / "results"
    lines = [cells(line) for line in (results / "quickstart.md").read_text().splitlines() if line.startswith("|")]
    columns = [lines[0].index(name) for name in ("mean@32", "distinct right", "steps in band")]
    names = [line[0].removeprefix("Entrocraft, ") for line in lines]
    small = {
        name: [line[c].replace(" ± ", "±") for c in columns] for name, line in zip(names[2:], lines[2:], strict=True)
    }
    content = json.loads((results / "real_model.json").read_text())
    start = content["starts"]["real_model"]
    real = {"starting policy": [f"{start['mean@32']:.3f}", f"{start['distinct_correct']:.1f}", "–", "–"]}
    for row in content["rows"]:
        name = {"grpo": "GRPO"}.get(row["method"], row["method"])
        figures = f"{row['mean_at_32']:.3f} {row['distinct_correct']:.1f} {row['in_band_share']:.0%}"
        real[name.replace("_", " ")] = [*figures.split(), f"{row['rms_outside']:.3f}"]
    return small, real


def test_its_table_is_that_of_the_committed_runs():
    small, real = committed_tables()
    table = README.read_text(encoding="utf-8").partition("| policy |")[2].partition("\n\n")[0].splitlines()
    rows = {cells(line)[0].partition(" (")[0]: cells(line)[1:] for line in table[2:]}
    assert rows.keys() == small.keys() | real.keys()
    for name, row in rows.items():
        assert row == real.get(name, ["–"] * 4) + small.get(name, ["–"] * 3), name


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
