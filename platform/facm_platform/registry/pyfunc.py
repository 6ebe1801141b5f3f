"""What makes an artefact's folder a model that ``mlflow models predict`` and ``serve`` can run.

The weights stay what they are, one safetensors file; MLflow runs `model_code.py` from source
("models from code"). Nothing is pickled.
"""

from __future__ import annotations

import importlib.metadata
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import mlflow.pyfunc
import numpy as np
from mlflow.models import Model, ModelSignature
from mlflow.types import ColSpec, ParamSchema, ParamSpec, Schema, TensorSpec

import facm_core
import facm_platform
from facm_platform.registry.artifact import ArtifactConfig

_CODE = Path(__file__).with_name("model_code.py")
# What the code that travels with a model imports. Not `mlflow[...]`: serving it needs no more.
_REQUIREMENTS = (
    "boto3",
    "mlflow",
    "numpy",
    "omegaconf",
    "pandas",
    "pyarrow",
    "ray",
    "safetensors",
    "torch",
)
# Decodes the latents of the models that are not trained on pixels.
_OPTIONAL = ("diffusers",)
# Embed the prompts of the models of texts.
_OF_TEXTS = ("ftfy", "transformers")


@contextmanager
def pyfunc_files(config: ArtifactConfig) -> Iterator[Path]:
    """A folder of the files to lay beside an artefact's own; gone when the block ends.

    Args:
        config: The artefact's.
    """
    with tempfile.TemporaryDirectory(prefix="facm-") as parent:
        folder = Path(parent) / "model"
        with warnings.catch_warnings():
            # An input example would be run at once, without the weights; the signature is given.
            warnings.filterwarnings("ignore", ".*input example", UserWarning)
            mlflow.pyfunc.save_model(
                str(folder),
                python_model=str(_CODE),
                code_paths=[str(Path(p.__path__[0])) for p in (facm_core, facm_platform)],
                signature=_signature(config),
                pip_requirements=_requirements(config),
            )
        description = Model.load(str(folder))
        flavor = description.flavors[mlflow.pyfunc.FLAVOR_NAME]
        # The folder itself is the artefact. As an artefact of MLflow's it would be copied.
        flavor["artifacts"] = {"model": {"path": ".", "uri": "."}}
        # MLflow writes where the file lay on the machine that saved the model.
        flavor["model_code_path"] = _CODE.name
        description.save(str(folder / "MLmodel"))
        yield folder


def _signature(config: ArtifactConfig) -> ModelSignature:
    """Classes or prompts in, images out, with the parameters that every request may give."""
    labelled = config.architecture.num_classes > 0
    column = ColSpec("long", "label") if labelled else ColSpec("string", "prompt")
    return ModelSignature(
        inputs=Schema([column]),
        outputs=Schema([TensorSpec(np.dtype(np.uint8), (-1, -1, -1, -1))]),
        params=ParamSchema(
            [
                ParamSpec("steps", "long", min(config.recommended_nfe)),
                ParamSpec("seed", "long", 0),
            ]
        ),
    )


def _requirements(config: ArtifactConfig) -> list[str]:
    """The packages of this process, by version; the optional ones where they are installed."""
    optional = _OPTIONAL if config.architecture.num_classes else (*_OPTIONAL, *_OF_TEXTS)
    installed = {d.metadata["Name"].lower() for d in importlib.metadata.distributions()}
    names = (*_REQUIREMENTS, *(name for name in optional if name in installed))
    # Without the local part, such as +cpu, which belongs to one machine.
    return [f"{name}=={importlib.metadata.version(name).partition('+')[0]}" for name in names]
