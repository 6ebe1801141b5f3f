"""A student of texts from its artefact to pictures over HTTP."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from facm_platform.config.sections import DataConfig, RunConfig
from facm_platform.evaluation.evaluate import EvaluateConfig
from facm_platform.evaluation.evaluate import prepare as prepare_evaluation
from facm_platform.registry.generator import Generator
from facm_platform.registry.promote import PromoteConfig
from facm_platform.registry.promote import prepare as prepare_promotion
from facm_platform.serving import ServeConfig
from facm_platform.serving import prepare as prepare_service
from facm_platform.tracking import Store, TrackingConfig
from tests.conftest import free_port
from tests.serving.test_service import call
from tests.tiny_wan import write_text_world

PROMPTS = ["a red barn in the snow", "two cats"]


@pytest.mark.slow
@pytest.mark.usefixtures("ray_cluster")
def test_evaluated_promoted_and_served_by_prompt(store: Store, tmp_path: Path) -> None:
    world = write_text_world(tmp_path / "world", PROMPTS)
    tracking, root = TrackingConfig(uri=store.uri), str(tmp_path / "runs")
    evaluation = EvaluateConfig(
        run=RunConfig(name="look", storage_uri=root, tracking=tracking),
        data=DataConfig(uri=world.set),
        student_uri=world.student,
        teacher_uri=world.teacher,
        features_uri=world.features,
        samples=64,
        nfe=(1, 2),
        teacher_nfe=(4,),
        actors=1,
        register_as="pictures",
    )
    metrics = prepare_evaluation(evaluation).execute().metrics
    assert {"fid_nfe1", "fid_nfe2", "teacher_fid_nfe4"} <= set(metrics)
    promotion = PromoteConfig(model="pictures", nfe=2, storage_uri=root, tracking=tracking)
    assert prepare_promotion(promotion).execute().metrics == {"fid": metrics["fid_nfe2"]}

    generator = Generator.load(world.student)
    service = prepare_service(ServeConfig(model="pictures", port=free_port(), tracking=tracking))
    with service.running():
        for seed, prompt in enumerate(PROMPTS):
            asked = {"prompt": prompt, "seed": seed, "steps": 4}
            answer = call(f"{service.address}/generate", json.dumps(asked).encode())
            assert (answer.status, answer.headers["X-Model-Version"]) == (200, "1")
            with Image.open(io.BytesIO(answer.content)) as picture:
                pixels = np.asarray(picture).transpose(2, 0, 1)
            assert np.array_equal(pixels, generator.generate([prompt], [seed], 4)[0])
