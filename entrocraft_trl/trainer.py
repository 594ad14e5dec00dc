"""TRL's trainers with entropy control and the services."""

from trl import GRPOTrainer, RLOOTrainer

from .config import EntrocraftGRPOConfig, EntrocraftRLOOConfig
from .control.mixin import EntropyControlMixin
from .services import Services


class EntrocraftGRPOTrainer(EntropyControlMixin, Services, GRPOTrainer):
    """
    [`~trl.GRPOTrainer`] whose policy entropy follows a band (Entrocraft, arXiv 2604.26326). What is different stands
    in [`EntropyControlMixin`] (the method) and [`Services`] (checkpoints, Hub, card, checks).

    Example:

    ```python
    from entrocraft_trl import EntrocraftGRPOConfig, EntrocraftGRPOTrainer

    trainer = EntrocraftGRPOTrainer(
        model="Qwen/Qwen3-0.6B",
        reward_funcs=accuracy_reward,
        args=EntrocraftGRPOConfig("run", entropy_low=[0.9, 0.15], entropy_high=[1.05, 0.3]),
        train_dataset=dataset,
    )
    trainer.train()
    ```
    """

    _tag_names = ["trl", "grpo", "entrocraft"]
    _config_class = EntrocraftGRPOConfig


class EntrocraftRLOOTrainer(EntropyControlMixin, Services, RLOOTrainer):
    """
    [`~trl.RLOOTrainer`] whose policy entropy follows a band: as [`EntrocraftGRPOTrainer`].
    """

    _tag_names = ["trl", "rloo", "entrocraft"]
    _config_class = EntrocraftRLOOConfig
