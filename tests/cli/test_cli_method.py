"""`entrocraft train --method NAME`: any method from the same command and the same file."""

import pytest
import yaml

from entrocraft_trl.cli import main
from entrocraft_trl.cli.arguments import parse
from entrocraft_trl.methods import METHODS
from entrocraft_trl.tasks import build_model, build_tokenizer


@pytest.fixture
def config(tmp_path):
    """Writes a config file of these settings; returns its path."""

    def write(**settings):
        path = tmp_path / "run.yaml"
        path.write_text(yaml.safe_dump({"embedded_task": "expressions", "output_dir": "run", **settings}))
        return str(path)

    return write


def error_line(argv, capsys) -> str:
    """Run a command that must fail with code 2 and one line on stderr; return that line without its prefix."""
    assert main(argv) == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line.removeprefix("entrocraft: error: ")


OFF_POLICY = ["--steps_per_generation", "2"]  # KL-Cov warns on-policy


@pytest.mark.parametrize("method", METHODS)
def test_the_option_and_the_key_choose_the_config(method, config):
    by_option = parse(["--method", method, "--config", config(), *OFF_POLICY])
    by_key = parse([f"--config={config(method=method)}", *OFF_POLICY])
    for script_args, training_args, *_ in (by_option, by_key):
        assert script_args.method == method and type(training_args) is METHODS[method][1]


def test_without_either_it_is_entrocraft_and_the_option_wins_over_the_key(config):
    assert parse(["--config", config()])[0].method == "entrocraft"
    assert parse(["--config", config(method="nsr"), "--method=aent"])[0].method == "aent"


def test_one_file_serves_several_methods_and_what_is_not_read_is_said(config, capsys):
    file = config(entropy_low=[0.9, 0.5], entropy_high=[1.0, 0.6], clip_cov_ratio=1e-3, learning_rate=1e-4)
    _, args, *_ = parse(["--config", file, "--method", "clip_cov"])
    assert (args.clip_cov_ratio, args.learning_rate) == (1e-3, 1e-4)
    said = "entrocraft: clip_cov does not read these keys of the config file: entropy_high, entropy_low\n"
    assert capsys.readouterr().err == said
    _, args, *_ = parse(["--config", file])
    assert args.entropy_low == [0.9, 0.5]
    assert "entrocraft does not read these keys of the config file: clip_cov_ratio\n" in capsys.readouterr().err


def test_a_number_as_yaml_reads_it_is_a_number(tmp_path):
    (tmp_path / "run.yaml").write_text("method: clip_cov\nclip_cov_ratio: 1e-3\n")  # text, for YAML
    assert parse(["--config", str(tmp_path / "run.yaml")])[1].clip_cov_ratio == 1e-3


def test_what_no_method_has_is_refused_still(config, capsys):
    file = config(clip_cov_raito=1e-3)
    line = error_line(["train", "--config", file, "--method", "clip_cov"], capsys)
    assert line == "unknown key in the config file: 'clip_cov_raito'; did you mean 'clip_cov_ratio'?"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--method", "clipcov"], "there is no method 'clipcov'; the names are: entrocraft, grpo, clip_cov, kl_cov"),
        (["--meth", "clip_cov"], "write --method clip_cov in full"),
        (["--method", "nsr", "--entropy_low", "1"], "unknown option: 'entropy_low'"),
        (["--method"], "--method: expected one argument"),
        (["--method", "nsr", "--scale_rewards", "group"], "scale_rewards='group' is not for NSRConfig"),
    ],
)
def test_mistakes_are_one_line(options, message, capsys):
    assert message in error_line(["train", "--embedded_task", "expressions", *options], capsys)


def test_a_method_that_is_no_name_is_refused(config, capsys):
    assert "there is no method ['nsr']" in error_line(["train", "--config", config(method=["nsr"])], capsys)


def test_the_plan_says_the_method_and_its_fields(config, capsys):
    assert main(["train", "--config", config(method="nsr", reward_coding="zero_one"), "--dry_run"]) == 0
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert lines[lines.index("method nsr") + 1 :] == [
        *("reward_coding zero_one", "positive_weight 0.0", "negative_weight 1.0", "rejected_rollouts drop")
    ]


def test_the_help_has_the_names_and_the_fields_of_the_method(capsys):
    with pytest.raises(SystemExit):
        main(["train", "--method", "aent", "--help"])
    text = capsys.readouterr().out
    assert "{" + ",".join(METHODS) + "}" in text and "--aent_clamp" in text and "--entropy_low" not in text


def test_a_rival_trains_from_the_command(tmp_path, capsys):
    build_model().save_pretrained(tmp_path / "start")  # untrained: the task's own takes long where it is not made yet
    build_tokenizer().save_pretrained(tmp_path / "start")
    options = ["--model_name_or_path", str(tmp_path / "start")]
    options += ["--max_steps", "1", "--per_device_train_batch_size", "8", "--max_completion_length", "8"]
    options += ["--disable_tqdm", "true", "--report_to", "none", "--output_dir", str(tmp_path / "run")]
    assert main(["train", "--method", "entropic", "--embedded_task", "expressions", *options]) == 0
    assert "1 steps done" in capsys.readouterr().out
    assert "## EntroPIC" in (tmp_path / "run" / "README.md").read_text()
