"""The section `output`: what a run writes, where it reports, and how it resumes."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from dlora.registry import option, required

Score = Literal["exact_match", "bleu", "chrf", "rouge1", "rouge2", "rougeL"]
Tracker = Literal["tensorboard", "wandb", "mlflow", "trackio", "comet_ml", "aim"]


@dataclass(frozen=True, kw_only=True)
class OutputConfig:
    """What a run writes, and how it resumes."""

    dir: str = required("directory of the run")
    log_every: int = option(1, "steps between metrics; 0: never", ge=0)
    eval_every: int = option(50, "steps between evaluations; 0: never", ge=0)
    eval_metrics: list[Score] = option(
        [],
        "scores of greedy answers to the prompts of data.eval, at each evaluation: exact_match; "
        "bleu and chrf by sacrebleu; rouge1, rouge2 and rougeL by rouge-score",
    )
    eval_prompts: int | None = option(
        None, "answer the first so many prompts of data.eval for eval_metrics; null: all", ge=1
    )
    eval_max_new_tokens: int = option(128, "most tokens of such an answer", ge=1)
    keep_best: dict[str, str] | None = option(
        None,
        "{metric: ..., mode: min or max}: the adapter of the best evaluation by this figure is "
        "kept in output.dir/best; without mode, as is better for the figure",
    )
    early_stopping: dict[str, str | int] | None = option(
        None,
        "{metric: ..., patience: N}: the run ends once the figure has not been better than its "
        "best in N evaluations one after the other",
    )
    save_every: int = option(50, "steps between checkpoints; 0: never", ge=0)
    snapshot_every: int = option(
        1, "steps between snapshots in host memory, which survivors of a lost rank commit", ge=1
    )
    keep_last: int = option(2, "checkpoints to keep", ge=1)
    remote: str | None = option(
        None, "an fsspec URL (s3://..., gs://...): checkpoints are copied there and fetched from it"
    )
    resume: str = option("auto", "auto, none, or the path of a checkpoint")
    stop_file: str | None = option(
        None, "a path; once this file exists, the run saves a checkpoint and exits, as on SIGTERM"
    )
    resume_force: bool = option(False, "resume even if base, data or settings differ")
    tensorboard: bool = option(True, "also write the metrics as TensorBoard scalars")
    report_to: list[Tracker] = option(
        [], "also report metrics and configuration to these trackers, whose packages you install"
    )
    metrics_port: int | None = option(
        None, "rank 0 serves its latest metrics on this port, for Prometheus", ge=1, le=65535
    )
    report: bool = option(
        False, "write report.html, one page on the run, into the directory once it has finished"
    )
    samples: int = option(0, "number of held-out prompts to answer before and after training", ge=0)

    @property
    def directory(self) -> Path:
        """`output.dir` as a path."""
        return Path(self.dir).expanduser()

    @property
    def stop_path(self) -> Path | None:
        """`output.stop_file` as a path."""
        return None if self.stop_file is None else Path(self.stop_file).expanduser()
