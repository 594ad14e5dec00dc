"""
Contract with TRL: every method, parameter, attribute and returned key of TRL that this package relies on.

When one of these tests fails on a new TRL version, the message says what changed and where the package uses it; the
version range in `entrocraft_trl/__init__.py` moves only when all of them pass.
"""

import inspect
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import torch
from transformers import Trainer, TrainerCallback
from transformers.trainer_callback import ExportableState
from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer
from trl.trainer.utils import add_fused_lm_head, shuffle_sequence_dict, split_tensor_dict

import entrocraft_trl
from entrocraft_trl import loss_inputs


PARENTS = [(GRPOTrainer, GRPOConfig), (RLOOTrainer, RLOOConfig)]
TRAINERS = [trainer for trainer, _ in PARENTS]


@pytest.mark.parametrize("trainer", TRAINERS)
@pytest.mark.parametrize(
    ("method", "parameters"),
    [
        ("_generate_and_score_completions", ["self", "inputs"]),
        ("_compute_loss", ["self", "model", "inputs"]),
        ("_calculate_rewards", ["self", "inputs", "prompts", "completions", "completion_ids_list"]),
    ],
)
def test_overridden_methods(trainer, method, parameters):
    assert hasattr(trainer, method), f"TRL's {trainer.__name__} lost {method}, which trainer.py overrides"
    found = list(inspect.signature(getattr(trainer, method)).parameters)
    assert found == parameters, f"TRL changed {trainer.__name__}.{method} to {found}; trainer.py overrides it"


@pytest.mark.parametrize("trainer", TRAINERS)
def test_log_prob_pass(trainer):
    parameters = inspect.signature(trainer._get_per_token_logps_and_entropies).parameters
    first = list(parameters)[:5]
    assert first == ["self", "model", "input_ids", "attention_mask", "logits_to_keep"], (
        f"TRL changed the order of {trainer.__name__}._get_per_token_logps_and_entropies to {first}; "
        "entropy.run_policy_pass passes these by position"
    )
    for name in ("batch_size", "compute_entropy"):
        assert name in parameters, (
            f"TRL's {trainer.__name__}._get_per_token_logps_and_entropies lost {name!r}; "
            "entropy.run_policy_pass and trainer.py's override pass it"
        )
    assert parameters["compute_entropy"].default is False, "TRL computes entropies by default: no need to ask for them"


def test_fused_head():
    parameters = list(inspect.signature(add_fused_lm_head).parameters)
    assert parameters == ["model", "temperature", "cast_lm_head_to_fp32", "outputs"], (
        f"TRL changed add_fused_lm_head to {parameters}; half_temperature.py calls it"
    )
    model = tiny.build_model()
    plain_forward = model.forward
    add_fused_lm_head(model, temperature=0.5, outputs=("log_probs", "entropy"))
    assert model.forward is not plain_forward, (
        "TRL's fused head no longer replaces model.forward (half_temperature.py)"
    )
    ids = torch.tensor([[3, 4, 5, 6]])
    output = model(input_ids=ids, labels=ids, fused_lm_head=True)
    assert output.log_probs.shape == output.entropy.shape, "half_temperature.py reads both fields"


def build(trainer_class, config_class, **settings):
    # RLOO has a KL term by default, which would load a reference model.
    args = tiny.build_config(config_class, **{"beta": 0.0, **settings})
    trainer = tiny.build_trainer(trainer_class, args=args)
    trainer.model.train()
    return trainer


NEEDED_KEYS = ["prompt_ids", "prompt_mask", "completion_ids", "completion_mask", "advantages"]


@pytest.mark.parametrize(("trainer_class", "config_class"), PARENTS)
def test_loss_inputs(trainer_class, config_class):
    trainer = build(trainer_class, config_class)
    batch = trainer._generate_and_score_completions(tiny.generation_inputs(trainer))
    for key in NEEDED_KEYS:
        assert key in batch, f"TRL's {trainer_class.__name__} no longer returns {key!r}; loss_inputs.py reads it"
    assert batch["advantages"].shape == (8,), (
        "TRL's advantages are no longer one per rollout; rejection.py expects (B,)"
    )
    assert batch["completion_mask"].shape == batch["completion_ids"].shape
    known = {*NEEDED_KEYS, "num_items_in_batch"} if trainer_class is GRPOTrainer else {*NEEDED_KEYS, "old_logps"}
    assert set(batch) == known, (
        f"TRL's {trainer_class.__name__} returns other loss inputs now: {set(batch) ^ known}. Does drop_rollouts have "
        "to treat a new one?"
    )
    if trainer_class is GRPOTrainer:
        count = batch["num_items_in_batch"]
        assert count.ndim == 0 and count == batch["completion_mask"].sum(), (
            "TRL changed num_items_in_batch; loss_inputs.drop_rollouts replaces it by the accepted tokens"
        )
    else:
        assert batch["old_logps"].shape == (8,), "find_policy_pass compares RLOO's old_logps with masked sums"


def test_optional_loss_inputs():
    rollouts = tiny.random_rollouts(8)
    extra = {"env_mask": [[1] * len(ids) for ids in rollouts], "logprobs": [[-1.0] * len(ids) for ids in rollouts]}
    args = tiny.build_config(GRPOConfig, num_iterations=2)
    trainer = tiny.build_trainer(GRPOTrainer, args=args, rollout_func=tiny.rollout_function(rollouts, **extra))
    trainer.model.train()
    batch = trainer._generate_and_score_completions(tiny.generation_inputs(trainer))
    for key, user in {
        "old_per_token_logps": "entropy.find_policy_pass",
        "tool_mask": "loss_inputs.loss_mask",
        "sampling_per_token_logps": "trainer._measure",
    }.items():
        assert key in batch, f"TRL no longer returns {key!r}; {user} reads it"
        assert batch[key].shape == batch["completion_ids"].shape


def test_old_policy_log_probs_are_the_very_tensor_of_the_pass(monkeypatch):
    trainer = build(GRPOTrainer, GRPOConfig, num_iterations=2)
    returned = []
    base = GRPOTrainer._get_per_token_logps_and_entropies

    def spy(self, *args, **kwargs):
        output = base(self, *args, **kwargs)
        returned.append(output)
        return output

    monkeypatch.setattr(GRPOTrainer, "_get_per_token_logps_and_entropies", spy)
    batch = trainer._generate_and_score_completions(tiny.generation_inputs(trainer))
    ((logps, entropies, aux_loss),) = returned
    assert entropies is None and aux_loss is None, (
        "TRL's pass returns (logps, entropies, aux_loss); trainer.py unpacks"
    )
    assert batch["old_per_token_logps"] is logps, (
        "TRL no longer hands on the pass's own tensor as old_per_token_logps; entropy.find_policy_pass tests identity"
    )


def test_passes_are_called_through_self_with_the_trainers_own_model():
    trainer = build(GRPOTrainer, GRPOConfig, num_iterations=2)
    models = []
    base = trainer._get_per_token_logps_and_entropies
    trainer._get_per_token_logps_and_entropies = lambda model, *a, **k: models.append(model) or base(model, *a, **k)
    trainer._generate_and_score_completions(tiny.generation_inputs(trainer))
    assert models == [trainer.model], (
        "trainer.py tells the policy's pass from the reference's by `model is self.model`"
    )


@pytest.mark.parametrize(("trainer_class", "config_class"), PARENTS)
def test_attributes(trainer_class, config_class):
    trainer = build(trainer_class, config_class, log_completions=True)
    for name, user in {
        "reward_weights": "trainer._calculate_rewards",
        "temperature": "half_temperature_head",
        "log_completions": "trainer._log_kept_column",
        "accelerator": "trainer._measure",
        "model": "trainer._measure",
        "_metrics": "trainer._edit_and_report",
        "_logs": "trainer._log_kept_column",
    }.items():
        assert hasattr(trainer, name), f"TRL's {trainer_class.__name__} lost {name}, which {user} reads"
    assert trainer.reward_weights.shape == (1,)
    trainer._metrics["train"]["entrocraft/test"].append(1.0)
    trainer._logs["extra"]["kept"].extend([True])
    assert trainer._logs["advantages"].maxlen == trainer._logs["extra"]["kept"].maxlen == 8, (
        "TRL's completion table columns have other lengths now; trainer._log_kept_column relies on equal ones"
    )
    trainer._generate_and_score_completions(tiny.generation_inputs(trainer))
    assert len(trainer._logs["advantages"]) == len(trainer._logs["prompt"]) == 8, (
        "TRL no longer logs advantages while preparing loss inputs; trainer._log_kept_column rewrites their tail"
    )
    if trainer_class is GRPOTrainer:
        assert trainer.loss_type == "dapo", "trainer._compute_loss reads loss_type; TRL's default was dapo"


@pytest.mark.parametrize(("trainer_class", "config_class"), PARENTS)
def test_rewards_come_back_gathered_with_one_column_per_function(trainer_class, config_class):
    trainer = build(trainer_class, config_class)
    inputs = [{"prompt": "1"}] * 8
    rewards = trainer._calculate_rewards(inputs, ["1"] * 8, ["12a"] * 8, [[3, 4, 5]] * 8)
    assert rewards.shape == (8, 1), "trainer._calculate_rewards weighs columns and slices this rank's rows"


def test_batch_edits_survive_shuffle_and_split():
    batch = {
        "rows": torch.arange(8),
        "num_items_in_batch": torch.tensor(5),
        "entrocraft_row_scale": torch.tensor(2.0),
        "entrocraft_kept": torch.arange(8) % 2 == 0,
    }
    parts = split_tensor_dict(shuffle_sequence_dict(batch), 4)
    message = (
        "TRL's shuffle_sequence_dict / split_tensor_dict treat {} differently now; loss_inputs.drop_rollouts adds it"
    )
    for part in parts:
        assert part["num_items_in_batch"] == 5 and part["num_items_in_batch"].ndim == 0, message.format(
            "0-dim tensors"
        )
        assert part["entrocraft_row_scale"] == 2.0, message.format("entrocraft_row_scale")
        assert torch.equal(part["entrocraft_kept"], part["rows"] % 2 == 0), message.format("entrocraft_kept")


def test_known_loss_types_are_trls():
    source = inspect.getsource(GRPOTrainer._compute_loss)
    for loss_type in set(loss_inputs.LOSS_TYPES) - {"rloo"}:
        assert f'"{loss_type}"' in source, f"TRL lost the loss {loss_type!r}; loss_inputs.py has its normaliser"
    for loss_type in re.findall(r'self\.loss_type == "(\w+)"', source):
        assert loss_type in loss_inputs.LOSS_TYPES, f"TRL has a new loss {loss_type!r}; loss_inputs.py must learn it"


@pytest.mark.parametrize("name", ["entropy_coef", "use_adaptive_entropy"])
def test_conflicting_settings_still_exist(name):
    assert name in GRPOConfig.__dataclass_fields__, f"TRL renamed {name}; config._check_conflicts refuses it"


@pytest.mark.parametrize("config", [GRPOConfig, RLOOConfig])
@pytest.mark.parametrize("name", ["top_p", "top_k", "min_p", "use_vllm", "per_device_train_batch_size", "temperature"])
def test_config_fields_still_exist(config, name):
    assert name in config.__dataclass_fields__, f"TRL renamed {config.__name__}.{name} (config.py, trainer.py)"


def test_trl_logs_nan_as_none():
    trainer = build(GRPOTrainer, GRPOConfig)
    trainer._metrics["train"]["probe"].append(float("nan"))
    logs = {}
    trainer.log(logs)
    assert logs["probe"] is None, (
        "TRL changed how it logs NaN; trainer._edit_and_report writes NaN where nothing is known"
    )


def test_checkpointed_callbacks():
    """state.py writes through transformers' ExportableState into trainer_state.json."""
    from entrocraft_trl.state import EntropyControlState

    assert issubclass(EntropyControlState, TrainerCallback) and issubclass(EntropyControlState, ExportableState)
    callback = EntropyControlState()
    callback.memory.horizon = 7
    assert EntropyControlState.from_state(callback.state()).memory.horizon == 7


RESUME_HOOKS = {
    "train": ["self", "resume_from_checkpoint", "trial", "ignore_keys_for_eval"],
    "_save_checkpoint": ["self", "model", "trial"],
    "_save_rng_state": ["self", "output_dir"],
    "_get_output_dir": ["self", "trial"],
    "_save": ["self", "output_dir", "state_dict"],
    "create_model_card": ["self", "model_name", "dataset_name", "tags"],
    "init_hf_repo": None,
    "_push_from_checkpoint": ["self", "checkpoint_folder"],
    "_finish_current_push": ["self"],
    "push_to_hub": ["self", "commit_message", "blocking", "token", "revision", "private", "kwargs"],
    "evaluation_loop": None,
    "_run_epoch": None,
}


@pytest.mark.parametrize("trainer", TRAINERS)
@pytest.mark.parametrize("method", RESUME_HOOKS)
def test_saving_loading_and_pushing(trainer, method):
    assert hasattr(trainer, method), f"{method} is gone from {trainer.__name__} (resume.py, hub.py, eval_metrics.py)"
    found = list(inspect.signature(getattr(trainer, method)).parameters)
    assert RESUME_HOOKS[method] in (None, found), (
        f"{trainer.__name__}.{method} takes {found} now; resume.py, hub.py or model_card.py override it"
    )


@pytest.mark.parametrize("trainer", TRAINERS)
def test_random_states_are_the_last_files_before_the_trainer_state(trainer):
    """resume.py writes its files in `_save_rng_state` and takes trainer_state.json for the commit record."""
    source = inspect.getsource(Trainer._save_checkpoint)
    order = [source.index(part) for part in ("self.save_model(", "self._save_rng_state(", "TRAINER_STATE_NAME")]
    assert order == sorted(order), "transformers writes checkpoints in another order now (checkpoint.py, resume.py)"


@pytest.mark.parametrize(("trainer_class", "config_class"), PARENTS)
def test_what_resume_saves(trainer_class, config_class):
    trainer = build(trainer_class, config_class, log_completions=True)
    assert (trainer._step, trainer._buffered_inputs) == (0, None), (
        f"{trainer_class.__name__} counts micro-steps or buffers batches otherwise now; resume.py saves both"
    )
    assert {"prompt", "completion", "advantages", "rewards", "extra"} <= set(trainer._logs), "resume.TABLE_COLUMNS"
    assert trainer.num_iterations == 1 and trainer.args.steps_per_generation == 1
    trainer.train()
    assert trainer._step == 1, "TRL no longer counts micro-steps in _step; resume.py saves it"
    for name in ("_tr_loss", "_total_loss_scalar", "_globalstep_last_logged"):
        assert hasattr(trainer, name), f"transformers renamed {name}; resume.py saves and restores it"


IMPORTS = "import sys, json, {module}; print(json.dumps(sorted(sys.modules)))"


def modules_after(statement) -> set[str]:
    environment = {**os.environ, "PYTHONPATH": str(Path(entrocraft_trl.__file__).parents[1])}
    output = subprocess.run(
        [sys.executable, "-c", IMPORTS.format(module=statement)],
        capture_output=True, text=True, check=True, env=environment, timeout=120,
    )  # fmt: skip
    return set(json.loads(output.stdout.splitlines()[-1]))


def test_import_costs_no_more_than_trls():
    extra = modules_after("entrocraft_trl") - modules_after("trl")
    top_level = {name.split(".")[0] for name in extra} - set(sys.stdlib_module_names)
    assert top_level <= {"entrocraft_trl", "packaging"}, f"import entrocraft_trl also imports {sorted(top_level)}"
    for heavy in ("torch", "transformers.trainer", "trl.trainer.grpo_trainer", "peft", "matplotlib"):
        assert heavy not in extra


def test_public_names_are_importable():
    for name in entrocraft_trl.__all__:
        assert getattr(entrocraft_trl, name) is not None
        assert name in dir(entrocraft_trl)
    with pytest.raises(AttributeError, match="has no attribute 'Nothing'"):
        entrocraft_trl.Nothing  # noqa: B018
