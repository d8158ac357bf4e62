"""Which rows of the data set a batch holds: the key `row_id`, taken out of the batch before the model sees it.

    row_ids = RowIds.attach(model)
    model(**batch)      # with batch["row_id"], int64 (rows,)
    row_ids.current     # the same tensor; None if the batch had none
    row_ids.detach()

A Trainer passes on the key only with `remove_unused_columns=False`, for no model takes it.
"""

import torch
from torch import nn

ROW_ID = "row_id"


class RowIds:
    """The row numbers of the batch that a model is given; one hook for all who ask, so that each of them sees them."""

    def __init__(self, model: nn.Module):
        self.current: torch.Tensor | None = None
        self._model, self._users = model, 0
        # First of all: no other hook, and no forward, is to see a key that it does not know.
        self._hook = model.register_forward_pre_hook(self._take, prepend=True, with_kwargs=True)

    @classmethod
    def attach(cls, model: nn.Module) -> "RowIds":
        """The model's own `RowIds`, made if there is none. model: what is called, without a DDP wrapper around it."""
        row_ids = vars(model).get("_row_ids")
        if row_ids is None:
            row_ids = cls(model)
            object.__setattr__(model, "_row_ids", row_ids)
        row_ids._users += 1
        return row_ids

    def detach(self) -> None:
        """Gives it up; the last user to do so removes the hook."""
        self._users -= 1
        if self._users == 0:
            self._hook.remove()
            object.__delattr__(self._model, "_row_ids")

    def _take(self, model: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        kwargs = dict(kwargs)
        self.current = kwargs.pop(ROW_ID, None)
        return args, kwargs
