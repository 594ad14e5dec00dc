"""Exact resume, SIGTERM to one rank, files of one rank lost or broken, NaN on one: two ranks, on every backend."""

import pytest
from cases import BACKENDS


PART, LIMIT = "resume_worker", 150


@pytest.fixture(scope="module", params=BACKENDS)
def ranks(request, launches):
    return launches.results(request.param, PART)


def test_resumed_run_is_the_uninterrupted_run(ranks):
    for rank in ranks:
        whole, resumed = rank["outcomes"]["whole"], rank["outcomes"]["resumed"]
        assert [line["step"] for line in whole["log"]] == [4, 6]
        assert resumed["log"] == whole["log"]
        assert resumed["memory"] == whole["memory"]
        assert resumed["warnings"] == []
        assert rank["differences"]["resumed"] == 0.0
    assert ranks[0]["outcomes"]["whole"]["log"] == ranks[1]["outcomes"]["whole"]["log"]


def test_signal_to_one_rank_stops_both_together(ranks):
    for rank in ranks:
        signalled, resumed = rank["outcomes"]["signalled"], rank["outcomes"]["signalled, resumed"]
        assert signalled["ended"] == "exit 143"
        assert signalled["handler_is_back"]
        assert rank["checkpoints"] == ["3: None"]
        assert resumed["log"] == rank["outcomes"]["whole"]["log"]
        assert resumed["memory"] == rank["outcomes"]["whole"]["memory"]
        assert rank["differences"]["signalled"] == 0.0


def test_late_signal_to_one_rank_stops_both_too(ranks):
    for rank in ranks:
        assert rank["outcomes"]["signalled late"]["ended"] == "exit 143"
        assert rank["differences"]["signalled late"] == 0.0


def test_lost_file_of_one_rank_makes_both_resume_as_trl_does(ranks):
    assert "Resuming as TRL does, not exactly: entrocraft_rank_1.pt" in ranks[0]["outcomes"]["lost"]["warnings"][0]
    first, second = (rank["outcomes"]["lost"] for rank in ranks)
    assert first["ended"] == second["ended"] == "whole"
    assert first["log"] == second["log"]
    assert first["log"] != ranks[0]["outcomes"]["whole"]["log"]  # otherwise the files would do nothing


def test_broken_file_of_one_rank_ends_both_with_its_name(ranks):
    for rank in ranks:
        assert rank["outcomes"]["broken"]["ended"].startswith("ValueError")
        assert "entrocraft_rank_1.pt cannot be read" in rank["outcomes"]["broken"]["ended"]


def test_half_written_file_of_one_rank_makes_a_checkpoint_incomplete(ranks):
    (warning,) = ranks[0]["outcomes"]["half"]["warnings"]
    assert "checkpoint-6 is not complete" in warning and ranks[0]["half"] in warning
    assert "resuming from checkpoint-3" in warning
    for rank in ranks:
        assert rank["outcomes"]["half"]["log"] == rank["outcomes"]["whole"]["log"]
        assert rank["differences"]["half"] == 0.0


def test_a_folder_that_is_taken_is_refused_on_both(ranks):
    for rank in ranks:
        started, in_use = (rank["outcomes"][name]["ended"] for name in ("started where another has been", "in use"))
        assert started.startswith("ValueError") and "holds checkpoint-6 of an earlier run" in started
        assert in_use.startswith("ValueError") and "is in use by another process" in in_use


def test_nan_on_one_rank_ends_both_and_is_not_saved(ranks):
    for rank in ranks:
        loss, weight = rank["outcomes"]["nan loss"]["ended"], rank["outcomes"]["nan weight"]["ended"]
        assert loss.startswith("FloatingPointError: The loss of step 3 is NaN or infinite on 1 of 2 processes"), loss
        assert weight.startswith("FloatingPointError: Before the save of step 3 a parameter is NaN"), weight
        assert "on 1 of 2 processes" in weight
        assert rank["saved"] == []
