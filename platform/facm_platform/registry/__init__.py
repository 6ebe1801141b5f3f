"""Model artefacts and the registered versions of a model."""

from facm_platform.registry.artifact import (
    Artifact,
    ArtifactConfig,
    ArtifactInfo,
    load_artifact,
    open_artifact,
    read_artifact,
    save_artifact,
    upload_artifact,
    write_artifact,
)

__all__ = [
    "Artifact",
    "ArtifactConfig",
    "ArtifactInfo",
    "load_artifact",
    "open_artifact",
    "read_artifact",
    "save_artifact",
    "upload_artifact",
    "write_artifact",
]
