"""The header that WebUIs and model managers show."""

from datetime import UTC, datetime, timedelta, timezone

import pytest

from library.sdxl.model_spec import ModelSpecOptions, model_spec

NOON_IN_KOLKATA = datetime(2024, 5, 6, 12, 0, 0, 789, tzinfo=timezone(timedelta(hours=5, minutes=30)))


def spec(options=None, *, timesteps=None, now=NOON_IN_KOLKATA, source=None, thumbnail=None):
    return model_spec(
        options or ModelSpecOptions(),
        name="finetuned_model",
        description="what it is",
        resolution=(1024, 768),
        timesteps=timesteps,
        now=now,
        source=source or {},
        thumbnail=thumbnail,
    )


def test_the_header_without_options_says_what_every_sdxl_checkpoint_must():
    assert spec() == {
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": "stable-diffusion-xl-v1-base",
        "modelspec.implementation": "https://github.com/Stability-AI/generative-models",
        "modelspec.title": "finetuned_model",
        "modelspec.resolution": "1024x768",
        "modelspec.prediction_type": "epsilon",
        "modelspec.date": "2024-05-06T06:30:00+00:00",
        "modelspec.description": "what it is",
    }


def test_what_the_user_says_is_added_and_the_title_taken():
    options = ModelSpecOptions(
        metadata_title="Wälder",
        metadata_author="猫",
        metadata_description="d",
        metadata_license="l",
        metadata_tags="a, b",
        metadata_usage_hint="h",
        metadata_trigger_phrase="t",
        metadata_merged_from="one, two",
    )
    added = {
        "modelspec.title": "Wälder",
        "modelspec.author": "猫",
        "modelspec.description": "d",
        "modelspec.license": "l",
        "modelspec.tags": "a, b",
        "modelspec.usage_hint": "h",
        "modelspec.trigger_phrase": "t",
        "modelspec.merged_from": "one, two",
    }
    assert spec(options) == {**spec(), **added}


def test_author_and_license_are_those_of_the_source_unless_the_user_says_others():
    source = {"modelspec.author": "Base Corp", "modelspec.license": "Base License", "modelspec.title": "Base"}
    assert spec(source=source) == {
        **spec(),
        "modelspec.author": "Base Corp",
        "modelspec.license": "Base License",
    }
    mine = spec(ModelSpecOptions(metadata_author="me"), source=source)
    assert (mine["modelspec.author"], mine["modelspec.license"]) == ("me", "Base License")


def test_the_range_of_timesteps_has_both_ends_as_the_specification_counts_them():
    """Its examples are 500,999 and 0,499: the halves of a thousand timesteps."""
    assert spec(timesteps=range(500, 1000)) == {**spec(), "modelspec.timestep_range": "500,999"}
    assert spec(timesteps=range(500))["modelspec.timestep_range"] == "0,499"


@pytest.mark.parametrize("now", [datetime(2024, 5, 6, 6, 30, tzinfo=UTC), NOON_IN_KOLKATA])
def test_the_date_is_that_of_universal_time_to_the_second(now):
    assert spec(now=now)["modelspec.date"] == "2024-05-06T06:30:00+00:00"
