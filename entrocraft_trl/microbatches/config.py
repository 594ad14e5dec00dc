"""The one field of this wing, to be mixed into a trainer's config."""

from dataclasses import dataclass, field


@dataclass
class MicroBatchConfig:
    """
    The field that [`MicroBatchMixin`] reads.

    Parameters:
        > Parameters that control which rows are computed

        compute_all_rows (`bool`, *optional*):
            By default, rollouts that add nothing to the gradient are not computed, and micro-batches are sorted by
            length and cropped, wherever the step is the same up to rounding; where it is not, all rows are computed as
            TRL does, and the reason is said once. TRL's passes of the old policy and of the reference go over the same
            rows where nothing reads them before the loss. `True`: always all rows, in TRL's order, bit for bit.
            `False`: as by default, and also with active dropout, which then draws other numbers for other rows.
    """

    compute_all_rows: bool | None = field(
        default=None,
        metadata={
            "help": "Unset: rollouts without gradient are not computed, where the step is the same up to rounding. "
            "true: all are, in TRL's order, bit for bit. false: as unset, and also with active dropout."
        },
    )

    def __post_init__(self):
        value = self.compute_all_rows
        if value is not None and not isinstance(value, bool):
            raise ValueError(f"compute_all_rows must be true, false or unset, got {value!r}.")
        super().__post_init__()
