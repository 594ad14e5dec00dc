"""The Hub during a run: uploads that neither stop training nor fail in silence."""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent import futures
from contextlib import contextmanager
from functools import cached_property

from huggingface_hub import upload_folder
from huggingface_hub.errors import HfHubHTTPError
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import logging

from .background_uploads import (
    SILENCE_LIMIT,
    UploadQueue,
    background_by,
    call_at_exit,
    limit_silence,
    patience_is_over,
)
from .sigterm import pause, wait_for_jobs


logger = logging.get_logger(__name__)

# transformers leaves these out of the model's own upload.
NEVER_PUSHED = ("_*", f"{PREFIX_CHECKPOINT_DIR}-*")
# Prompts and completions, in which `log_completions` may show private data; half-written checkpoints, by the name that
# version 0.1.0 gave them.
NOT_PUSHED = ("completions/*.parquet", f"incomplete-{PREFIX_CHECKPOINT_DIR}-*")


class HubUploadMixin:
    """
    For trainers with `push_to_hub=True`: put it before the trainer among the bases.

    transformers uploads checkpoints in a background thread and never looks at how that ended; huggingface_hub sends
    its requests without a time limit, and one that is never answered blocks all later uploads, the end of the training
    and the exit of the process. With this mixin a failed upload is a warning, a silent server is a failed upload, and
    waiting is bounded by `hub_patience`, also at exit (where Xet is off, by one `hub_silence_limit` more). Only the
    first contact, in the trainer's constructor, raises: nothing is lost yet, and a wrong token shows at once.

    With the model go the card, the tokenizer and what else lies in `output_dir`, but for what `hub_not_pushed` names:
    checkpoints, and the prompts and completions that `log_completions` writes. `hub_strategy="checkpoint"` and
    `"all_checkpoints"` push checkpoints too, and these hold the rollouts (token ids) that were still to be trained on,
    and with `log_completions` the last table of prompts and completions: for data that are not public, the repository
    must be private (`hub_private_repo=True`).
    """

    # Seconds without a byte after which a request counts as failed.
    hub_silence_limit = SILENCE_LIMIT
    # Seconds that the run waits for the Hub, in all, when it has nothing else left to do.
    hub_patience = 900.0
    hub_retry_pause = 20.0
    # Patterns of what stays on this machine, besides transformers' own. Set it to () to publish completions as well.
    hub_not_pushed = NOT_PUSHED
    _hub_waited = 0.0
    # Set when SIGTERM comes: there is no time to wait.
    sigterm_received = False

    def init_hf_repo(self, *args, **kwargs):
        limit_silence(self.hub_silence_limit)
        return super().init_hf_repo(*args, **kwargs)

    def _push_from_checkpoint(self, checkpoint_folder):
        running = self._upload_jobs()
        with self._uploading() as started:
            super()._push_from_checkpoint(checkpoint_folder)
        for job in started:  # one that has failed already is told at once
            job.add_done_callback(self._warn_if_failed)
        if running and not started:
            logger.warning(
                f"The checkpoint of step {self.state.global_step} was not pushed to {self.hub_model_id}, because an "
                "earlier upload is still running. It is complete on the local disk."
            )

    def _finish_current_push(self):
        # The parent's waits without a limit.
        if self.is_world_process_zero() and not self._wait(self._upload_jobs()):
            logger.warning(f"An upload to {self.hub_model_id} is still running. {self._how_to_push()}")

    def push_to_hub(self, commit_message="End of training", blocking=True, token=None, revision=None, **kwargs):
        """
        The parent's `push_to_hub`, with a limit to its time and without exceptions from the Hub once the repository
        exists. A failed upload is tried again until `hub_patience` seconds have passed.

        Returns:
            `CommitInfo`; with `blocking=False` a `Future` of it; `None` if the upload failed or goes on in the
            background, which was then logged, and on all processes but the main one.
        """
        with self._uploading():
            job = super().push_to_hub(commit_message, blocking=False, token=token, revision=revision, **kwargs)
        if job is None:
            return None
        if not blocking:
            job.add_done_callback(self._warn_if_failed)
            return job
        while True:
            if not self._wait([job]):
                logger.error(f"The upload to {self.hub_model_id} is still running. {self._how_to_push()}")
                return None
            error = job.exception()
            if error is None:
                self._hub_waited = 0.0
                return job.result()
            if _is_final(error) or self._hub_waited >= self.hub_patience or self.sigterm_received:
                logger.error(f"The upload to {self.hub_model_id} failed: {first_line(error)}. {self._how_to_push()}")
                return None
            logger.warning(
                f"The upload to {self.hub_model_id} failed: {first_line(error)}. Trying again in "
                f"{self.hub_retry_pause:.0f} s."
            )
            pause(self.hub_retry_pause, lambda: self.sigterm_received)
            self._hub_waited += self.hub_retry_pause
            # The model is on disk. The parent would save it again, together with ranks that have long moved on.
            with self._uploading():
                job = upload_folder(
                    repo_id=self.hub_model_id,
                    folder_path=self.args.output_dir,
                    commit_message=commit_message,
                    token=token if token is not None else self.args.hub_token,
                    revision=revision if revision is not None else self.args.hub_revision,
                    ignore_patterns=list(NEVER_PUSHED),
                    run_as_future=True,
                )

    @cached_property
    def _upload_queue(self) -> UploadQueue:
        call_at_exit(self._wait_at_exit)
        return UploadQueue()

    def _wait_at_exit(self) -> None:
        if self._hub_waited < self.hub_patience:
            self._finish_current_push()

    @contextmanager
    def _uploading(self) -> Iterator[list[futures.Future]]:
        """Uploads of the parent's that start within join our queue. Yields them."""

        def submit(upload, *args, **kwargs):
            if "ignore_patterns" in kwargs:  # the model's; a checkpoint is pushed as it is
                kwargs["ignore_patterns"] = [*kwargs["ignore_patterns"], *self.hub_not_pushed]
            return self._upload_queue.submit(upload, *args, **kwargs)

        limit_silence(self.hub_silence_limit)
        with background_by(submit) as jobs:
            yield jobs

    def _upload_jobs(self) -> list[futures.Future]:
        """Uploads that are not done."""
        return self._upload_queue.pending() if "_upload_queue" in vars(self) else []

    def _wait(self, jobs: list[futures.Future]) -> bool:
        """Whether all jobs ended within what is left of the patience, which waiting uses up."""
        start = time.monotonic()
        pending = wait_for_jobs(jobs, max(self.hub_patience - self._hub_waited, 0.0), lambda: self.sigterm_received)
        self._hub_waited += time.monotonic() - start
        if pending:
            patience_is_over.set()
        return not pending

    def _warn_if_failed(self, job: futures.Future) -> None:
        if not job.cancelled() and (error := job.exception()) is not None:
            logger.warning(
                f"An upload to {self.hub_model_id} failed: {first_line(error)}. Training goes on, checkpoints are on "
                "the local disk, and the next save pushes again."
            )

    def _how_to_push(self) -> str:
        folder = self.args.output_dir
        excluded = " ".join(f'--exclude "{pattern}"' for pattern in (*NEVER_PUSHED, *self.hub_not_pushed))
        return (
            f'The model is saved in {folder!r}; push it later with: hf upload {self.hub_model_id} "{folder}" . '
            f"{excluded}"
        )


def _is_final(error: BaseException) -> bool:
    """Whether trying again is no use: not the Hub is at fault but the request (4xx but 408 and 429, a wrong value)."""
    cause = error
    while cause is not None:  # the upload of one large file wraps what went wrong
        if isinstance(cause, HfHubHTTPError):
            status = cause.response.status_code
            return 400 <= status < 500 and status not in (408, 429)
        if isinstance(cause, (ValueError, TypeError)):
            return True
        cause = cause.__cause__
    return False


def first_line(error: BaseException) -> str:
    """Type and first line: the Hub's errors go on with request ids and advice."""
    return f"{type(error).__name__}: {(str(error).strip() or 'no message').splitlines()[0].rstrip('.')}"
