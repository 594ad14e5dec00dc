"""What every trainer of this package has beside its method, composed once."""

from .checkpoints.hub import HubUploadMixin
from .checkpoints.resume import ExactResumeMixin
from .data.checked_inputs import CheckedInputsMixin
from .evaluation.during_training import EvaluationMetricsMixin
from .microbatches.mixin import MicroBatchMixin
from .reports.model_card import ModelCardMixin


class Services(
    CheckedInputsMixin, EvaluationMetricsMixin, ModelCardMixin, HubUploadMixin, ExactResumeMixin, MicroBatchMixin
):
    """
    Checked rows and rewards, mean@n and pass@k in evaluations, a model card, uploads that never stop a training,
    checkpoints that are resumed exactly, and updates that compute only rows with a gradient: for trainers of TRL's,
    before the trainer among the bases and after a method:

    ```python
    class Mine(EntropyControlMixin, Services, MyGRPOTrainer): ...
    ```

    Knows nothing of entropy. A config of one's own has the switch of the last (`compute_all_rows`) by mixing in
    [`MicroBatchConfig`]; without it the default holds. A method gives the model card its section (`card_section`).
    """
