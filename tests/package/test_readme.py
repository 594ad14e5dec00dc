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


def table_after(heading: str) -> dict[str, list[str]]:
    """Rows of the README's table whose first column is `heading`, by their name without what is in brackets."""
    table = README.read_text(encoding="utf-8").partition(f"| {heading} |")[2].partition("\n\n")[0].splitlines()
    return {cells(line)[0].partition(" (")[0]: cells(line)[1:] for line in table[2:]}


def test_its_table_is_that_of_the_committed_runs():
    content = json.loads((ROOT / "benchmarks" / "results" / "real_model.json").read_text())
    start = content["starts"]["real_model"]
    expected = {"starting policy": [f"{start['mean@32']:.3f}", f"{start['distinct_correct']:.1f}", "–", "–"]}
    for row in content["rows"]:
        name = {"grpo": "GRPO", "repo_r": "REPO-R"}.get(row["method"], row["method"])
        figures = f"{row['mean_at_32']:.3f} {row['distinct_correct']:.1f} {row['in_band_share']:.0%}"
        expected[name.replace("_", " ")] = [*figures.split(), f"{row['rms_outside']:.3f}"]
    assert table_after("policy") == expected


def test_its_table_of_methods_is_that_of_the_comparison():
    rows = json.loads((ROOT / "benchmarks" / "results" / "compare.json").read_text())["rows"]
    found = table_after("method")
    assert len(found) > 5
    for name, shown in found.items():
        method = name.lower().replace("-", "_").replace(" ", "_")
        expected = []
        for regime in ("on_policy", "off_policy"):
            (row,) = [row for row in rows if (row["method"], row["regime"]) == (method, regime)]
            assert row["seeds"] == [0, 1, 2]
            for key, form in (("mean_at_32", ".2f"), ("distinct_correct", ".1f"), ("rms_outside", ".3f")):
                expected.append(f"{row[key]:{form}}±{row['std'][key]:{form}}")
        assert shown == expected, name


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
