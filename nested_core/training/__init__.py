"""Training encoders: the paper's recipe on diffusers and accelerate. Needs requirements-training.txt.

    from nested_core.training import BaseModel, TrainingConfig, train

    path = train(TrainingConfig(...), base, data)

or, from the command line, `python -m nested_core.training --config file.yaml`. See docs/training.md.
"""

try:
    from .base import BaseModel, VisionTower, load_base
    from .config import (
        BaseConfig,
        DataConfig,
        EncoderSettings,
        InitConfig,
        LossConfig,
        OptimiserConfig,
        SampleConfig,
        TrainingConfig,
        ValidationConfig,
    )
    from .examples import Example, ExampleSubject
    from .export import load_trained
    from .loop import train
except ModuleNotFoundError as error:
    if error.name is None or error.name.startswith(__name__.split(".")[0]):
        raise
    raise ModuleNotFoundError(
        f"Training an encoder needs {error.name}, which is not installed: pip install -r requirements-training.txt. "
        "The nodes need none of it.",
        name=error.name,
    ) from None

__all__ = [
    "BaseConfig",
    "BaseModel",
    "DataConfig",
    "EncoderSettings",
    "Example",
    "ExampleSubject",
    "InitConfig",
    "LossConfig",
    "OptimiserConfig",
    "SampleConfig",
    "TrainingConfig",
    "ValidationConfig",
    "VisionTower",
    "load_base",
    "load_trained",
    "train",
]
