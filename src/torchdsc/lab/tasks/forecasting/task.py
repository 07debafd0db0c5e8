"""The task of forecasting: squared error of forecasts of held-out rows."""

from pathlib import Path
from typing import Any, ClassVar

import torch

from torchdsc.lab.budget import describe_misses
from torchdsc.lab.tasks.task import Column, Measure, Timed
from torchdsc.lab.tasks.task import Task as Base
from torchdsc.lab.training.environment import quiet_transformers
from torchdsc.lab.training.loading import load_model

from .data import Data, load_data
from .model import PatchForecaster
from .run import MODEL, make_plan, measure_seconds, train_run
from .settings import Settings

__all__ = ["Task"]


class Task(Base[Settings]):
    """Patch transformers with different feed-forward layers, by the error of their forecasts."""

    settings_type = Settings
    measure: ClassVar[Measure] = Measure(
        key="val_mse_final",
        name="validation MSE",
        unit="squared deviations",
        decimals=4,
        lower_is_better=True,
        curve="val_mse",
        size="params_total",
        test="test_mse",
    )
    columns: ClassVar[tuple[Column, ...]] = (
        Column("total", lambda run: run["params_total"], ",.0f"),
        Column("active", lambda run: run["params_active"], ",.0f"),
        Column("validation MAE", lambda run: run["val_mae_final"], ".4f", has_spread=True),
        Column("test MSE", lambda run: run["test_mse"], ".4f", has_spread=True),
        Column("test MAE", lambda run: run["test_mae"], ".4f", has_spread=True),
    )
    timed_words: ClassVar[str] = "forward pass"

    def __init__(self) -> None:
        self._loaded: dict[tuple[object, ...], Data] = {}

    def describe(self, settings: Settings) -> str:
        """The widths that the budget comes to, and by how much they miss it."""
        plan = make_plan(settings)
        return "; ".join([str(plan), *describe_misses(plan, settings.budget, settings.match)])

    def data(self, settings: Settings) -> dict[str, str]:
        """The file's hash."""
        return self._data(settings).hashes

    def run(self, settings: Settings, seed: int, folder: Path, *, label: str, is_trial: bool) -> dict[str, Any]:
        """See :func:`~torchdsc.lab.tasks.forecasting.run.train_run`."""
        return train_run(settings, seed, self._data(settings), folder, label=label, is_trial=is_trial)

    def timed(self, settings: Settings, folder: Path) -> Timed | None:
        """The forward pass of an evaluation batch through a trained model."""
        if not (folder / MODEL).is_dir():
            return None
        device = "cuda" if torch.cuda.is_available() else "cpu"
        with quiet_transformers():
            model: Any = load_model(PatchForecaster, folder / MODEL).eval()
        model.to(device)
        windows = self._data(settings).windows("valid")
        rows = [windows[index % len(windows)]["past_values"] for index in range(settings.eval_batch_size)]
        inputs = torch.stack(rows).to(device)

        @torch.inference_mode()
        def call() -> object:
            return model(inputs)

        return Timed(call, tuple(inputs.shape))

    def seconds(self, settings: Settings, *, is_trial: bool) -> float:
        """From a few steps and an evaluation."""
        return measure_seconds(settings, self._data(settings), is_trial=is_trial)

    def _data(self, settings: Settings) -> Data:
        if settings.data_key not in self._loaded:
            self._loaded[settings.data_key] = load_data(settings)
        return self._loaded[settings.data_key]
