"""A trainer with a loss of its own says what it divides by; who says nothing is refused before the model loads."""

import dataclasses

import equality
import pytest
import tiny
from trl import GRPOConfig, GRPOTrainer
from trl.experimental.gmpo import GMPOConfig, GMPOTrainer

from entrocraft_trl import EntrocraftGRPOTrainer, EntrocraftRLOOTrainer, EntropyControlMixin
from entrocraft_trl.control.config import EntropyControlConfig
from entrocraft_trl.normalisation import loss_normaliser


@dataclasses.dataclass
class MineConfig(EntropyControlConfig, GMPOConfig):
    """GMPO inherits `loss_type="dapo"`, and takes row means all the same."""


class Mine(EntropyControlMixin, GMPOTrainer):
    _config_class = MineConfig
    loss_normaliser = "row_means"


class Below(EntrocraftGRPOTrainer):
    """A loss of one's own below entropy control, without a call of `super()`."""

    _config_class = MineConfig
    loss_normaliser = "row_means"
    _compute_loss = GMPOTrainer._compute_loss


@pytest.mark.parametrize("ours", [Mine, Below])
@pytest.mark.parametrize(("split", "beta"), [("1x8", 0.0), ("2x4", 0.2), ("4x2", 0.0), ("2x4, two windows", 0.2)])
def test_gmpo_steps_as_on_the_accepted_rows_alone(ours, split, beta, reference_folder):
    settings = {**equality.SPLITS[split], "beta": beta}
    equality.check(None, settings, -1, reference_folder, classes=(GMPOTrainer, GMPOConfig, ours))


# ------------------------------------------------------------------------------------------------- who declares what


class Silent(GRPOTrainer):
    def _compute_loss(self, model, inputs):
        return super()._compute_loss(model, inputs)


class Declared(Silent):
    loss_normaliser = "local_tokens"


class Wrapped(Silent):
    """Returns what TRL's loss returns."""

    loss_normaliser = "loss_type"


class Replaced(Declared):
    """The declaration above is about the loss that this class replaces."""

    def _compute_loss(self, model, inputs):
        return super()._compute_loss(model, inputs)


@pytest.mark.parametrize(
    ("trainer_class", "loss_type", "expected"),
    [
        (EntrocraftGRPOTrainer, "dapo", "tokens"),
        (EntrocraftGRPOTrainer, "cispo", "tokens"),
        (EntrocraftGRPOTrainer, "vespo", "tokens"),
        (EntrocraftGRPOTrainer, "grpo", "row_means"),
        (EntrocraftGRPOTrainer, "dr_grpo", "rows"),
        (EntrocraftGRPOTrainer, "sapo", "row_means"),
        (EntrocraftGRPOTrainer, "luspo", "rows"),
        (EntrocraftGRPOTrainer, "bnpo", "local_tokens"),
        (Declared, "dapo", "local_tokens"),
        (Wrapped, "dapo", "tokens"),
        (Mine, "dapo", "row_means"),
    ],
)
def test_normaliser(trainer_class, loss_type, expected):
    assert loss_normaliser(trainer_class, GRPOConfig(loss_type=loss_type, bf16=False)) == expected


def test_normaliser_of_rloo():
    args = EntrocraftRLOOTrainer._config_class(bf16=False)
    assert loss_normaliser(EntrocraftRLOOTrainer, args) == "rows"


def with_control(trainer_class, **attributes):
    """`trainer_class` under entropy control, and a model that nobody may touch before the refusal."""
    return type("Own", (EntropyControlMixin, trainer_class), {"_config_class": MineConfig, **attributes})


@pytest.mark.parametrize(
    "trainer_class",
    [
        with_control(GMPOTrainer),
        with_control(Silent),
        with_control(Replaced),
        type("Own", (with_control(GRPOTrainer),), {"_compute_loss": GMPOTrainer._compute_loss}),
    ],
)
def test_a_silent_loss_is_refused_with_the_line_that_declares_it(trainer_class):
    args = tiny.build_config(MineConfig)
    with pytest.raises(TypeError, match='Add to Own the line\n    loss_normaliser = "row_means"\n'):
        tiny.build_trainer(trainer_class, model="no/such-model", args=args)


def test_an_unknown_declaration_is_refused():
    trainer_class = with_control(GMPOTrainer, loss_normaliser="sequences")
    with pytest.raises(ValueError, match="'row_means', 'local_tokens', 'loss_type', got 'sequences'"):
        tiny.build_trainer(trainer_class, model="no/such-model", args=tiny.build_config(MineConfig))


def test_an_unknown_loss_type_is_refused():
    args = tiny.build_config(loss_type="grpo2")
    with pytest.raises(ValueError, match="got loss_type='grpo2'; known are 'dapo'"):
        tiny.build_trainer(model="no/such-model", args=args)


def test_scores_need_a_declaration_however_rejected_rollouts_are_treated():
    args = tiny.build_config(MineConfig, rejected_rollouts="zero_advantage", rejection_rule="entropy_change")
    with pytest.raises(TypeError, match="Add to Own the line"):
        tiny.build_trainer(with_control(GMPOTrainer), model="no/such-model", args=args)


def test_the_sign_rule_with_zero_advantages_needs_no_declaration():
    args = tiny.build_config(MineConfig, rejected_rollouts="zero_advantage", **tiny.TOO_LOW)
    trainer = tiny.build_trainer(with_control(GMPOTrainer), args=args)
    trainer.train()
    assert tiny.history(trainer, "entrocraft/accepted_rollouts")[0] < 1
