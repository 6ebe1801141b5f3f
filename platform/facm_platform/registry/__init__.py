"""Model artefacts and the registered versions of a model."""

from facm_platform.registry.artifact import Artifact, ArtifactConfig, load_artifact, save_artifact

__all__ = ["Artifact", "ArtifactConfig", "load_artifact", "save_artifact"]
