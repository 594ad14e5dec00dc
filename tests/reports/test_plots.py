"""Figures from log records: curves, labels, bands, and that a file written is a picture."""

import io

import pytest

from entrocraft_trl.reports.plots import (
    plot_comparison,
    plot_entropy_and_pass_at_k,
    plot_pass_at_k,
    plot_run,
    plot_schedule,
    save_figure,
)


def records(steps: int = 10, band: bool = True) -> list[dict]:
    log = []
    for step in range(1, steps + 1):
        record = {"step": step, "entropy": 1.0 / step, "reward": 0.1 * step}
        if band:
            record |= {
                "entrocraft/entropy": 2.0 / step,
                "entrocraft/entropy_low": 0.2,
                "entrocraft/entropy_high": 0.4,
                "entrocraft/accepted_rollouts": 0.5,
            }
        log.append(record)
    return [*log, {"step": steps, "train_runtime": 1.0}]  # the record that transformers adds at the end


def test_run_shows_its_entropy_in_its_band_its_reward_and_its_accepted_share():
    entropy, reward, accepted = plot_run(records(), "a run").axes
    assert entropy.lines[0].get_ydata()[0] == 2.0  # Entrocraft's own measurement, not TRL's
    (band,) = entropy.collections
    assert set(band.get_paths()[0].vertices[:, 1]) == {0.2, 0.4}
    assert accepted.lines[0].get_ydata()[0] == 50.0
    assert reward.lines[0].get_ydata()[-1] == pytest.approx(1.0)


def test_plain_run_has_no_band():
    assert not plot_run(records(band=False)).axes[0].collections


@pytest.mark.parametrize("steps", [1, 2, 300])
def test_pictures_of_short_and_long_runs(tmp_path, steps):
    path = save_figure(plot_run(records(steps)), tmp_path / "new" / "run.png")
    assert path.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    assert path.stat().st_size > 10_000


@pytest.mark.parametrize(("name", "start"), [("a.png", b"\x89PNG"), ("a.svg", b"<?xml"), ("a", b"\x89PNG")])
def test_a_figure_is_where_it_is_said_to_be_in_the_format_of_its_suffix(tmp_path, name, start):
    path = save_figure(plot_run(records()), tmp_path / name)
    assert path == tmp_path / name and path.read_bytes().startswith(start)
    assert list(tmp_path.iterdir()) == [path]


def test_comparison_shades_a_shared_band_once():
    figure = plot_comparison({"GRPO": records(band=False), "A": records(), "B": records()})
    assert len(figure.axes[0].lines) == 3
    assert len(figure.axes[0].collections) == 1
    figure = plot_comparison({"A": records(), "B": records(5)})
    assert len(figure.axes[0].collections) == 2


def test_schedule_in_steps_or_percent():
    figure = plot_schedule([(0.0, 0.6, 0.7), (1.0, 0.1, 0.2)], total_steps=400)
    (axis,) = figure.axes
    assert axis.get_xlabel() == "Optimizer step"
    assert list(axis.lines[0].get_xdata()) == [0.0, 400.0]
    assert "%" in plot_schedule([(0.0, 0.6, 0.7)]).axes[0].get_xlabel()


BAND = [(0.7, 0.9), (0.5, 0.7), (0.3, 0.5)]
READINGS = {"GRPO": [[0.8, 0.4, 0.2], [0.8, 0.2, 0.0]], "_ours": [[0.8, 0.6, 0.4], [0.8, 0.6, 0.4]]}
CURVES = {
    "start": [{1: 0.1, 2: 0.2}, {1: 0.1, 2: 0.2}],
    "GRPO": [{2: 0.4, 1: 0.2}, {2: 0.6, 1: 0.4}],
    "_ours": [{1: 0.3, 2: 0.7}, {1: 0.5, 2: 0.9}],
}


def test_entropy_in_its_band_beside_pass_at_k_over_seeds():
    figure = plot_entropy_and_pass_at_k(READINGS, BAND, CURVES)
    left, right = figure.axes
    (band,) = left.collections
    assert band.get_paths()[0].vertices[:, 1].tolist().count(0.3) >= 1 and band.get_label() == "band"
    curves = [list(line.get_ydata()) for line in left.lines]
    # Two pale seeds and their mean for each run; the last is the dashed entry of the legend.
    assert curves[2] == pytest.approx([0.8, 0.3, 0.1]) and curves[5] == pytest.approx([0.8, 0.6, 0.4])
    assert list(left.lines[2].get_xdata()) == [1, 2, 3] and curves[6] == []
    start, grpo, ours = right.lines
    assert list(grpo.get_xdata()) == [1, 2] and list(grpo.get_ydata()) == pytest.approx([0.3, 0.5])
    area = right.collections[1].get_paths()[0].vertices[:, 1]  # a sample standard deviation to both sides
    assert (area.min(), area.max()) == pytest.approx((0.3 - 0.02**0.5, 0.5 + 0.02**0.5))
    assert start.get_linestyle() == "--" != grpo.get_linestyle()
    assert grpo.get_color() == left.lines[2].get_color() and ours.get_color() == left.lines[5].get_color()
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["band", "GRPO", " _ours", "start"]
    assert [text.get_text() for text in right.get_xticklabels()] == ["1", "2"]


def test_entropy_and_pass_at_k_of_one_seed_have_no_spread():
    first = ({name: seeds[:1] for name, seeds in group.items()} for group in (READINGS, CURVES))
    readings, curves = first
    left, right = plot_entropy_and_pass_at_k(readings, BAND, curves).axes
    assert [list(line.get_ydata()) for line in left.lines] == [[0.8, 0.4, 0.2], [0.8, 0.6, 0.4], []]
    assert not right.collections and list(right.lines[1].get_ydata()) == [0.2, 0.4]


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("$x_$", "$x_$"),  # no formula: as one, it raises when the figure is drawn
        ("cost $5_a$", "cost $5_a$"),  # and this one would be drawn as another text
        ("_hidden", " _hidden"),  # matplotlib would leave it out
        ("a\x1b[31m\tb", "a\\x1b[31m\\tb"),
        ("gpt\\frac^2_%&#{~}", "gpt\\frac^2_%&#{~}"),
    ],
)
@pytest.mark.filterwarnings("error")  # matplotlib warns of glyphs that it does not have, control characters among them
def test_names_are_drawn_as_they_are(name, shown):
    for figure in (
        plot_comparison({name: records(), "other": records()}, f"two\n{name}"),
        plot_pass_at_k({name: {1: 0.5, 2: 0.6}, "other": {1: 0.2}}, f"two\n{name}"),
    ):
        figure.savefig(io.BytesIO(), format="png")
        (legend,) = figure.legends
        assert [text.get_text() for text in legend.get_texts() if text.get_text() != "band"] == [shown, "other"]
        assert legend.get_title().get_text() == f"two\n{shown.strip()}"
        assert not any(text.get_parse_math() for text in (*legend.get_texts(), legend.get_title()))
    run = plot_run(records(), name)
    run.savefig(io.BytesIO(), format="png")
    assert run.legends[0].get_title().get_text() == shown.strip()


def test_messages():
    with pytest.raises(ValueError, match="no entropy"):
        plot_run([{"step": 1, "reward": 0.0}])
    with pytest.raises(ValueError, match="log of 'x' holds no entropy"):
        plot_comparison({"x": []})
    with pytest.raises(ValueError, match="no run to compare"):
        plot_comparison({})
