"""The section `data`: what a run's config must not contain."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from exfm_ray.config.data import FollowConfig, KafkaConfig
from exfm_ray.errors import UserError


@pytest.mark.parametrize(
    "name", ["sasl.password", "ssl.key.password", "ssl.key.pem", "sasl.oauthbearer.client.secret"]
)
def test_secrets_are_refused_in_a_config(name: str) -> None:
    """Wrong: a password for Kafka is written into runs/<name>/config.yaml and sent to wandb."""
    with pytest.raises(
        ValidationError, match=rf"option {name} would be written into the run's config"
    ) as caught:
        KafkaConfig.model_validate(
            {"servers": "b:9092", "topic": "t", "options": {name: "hunter2"}}
        )
    assert "hunter2" not in caught.value.errors()[0]["msg"]


def test_secrets_come_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Wrong: librdkafka receives the variable's name, the config contains its value, or a variable
    that is not set becomes an empty password."""
    config = KafkaConfig(
        servers="b:9092",
        topic="t",
        options={"sasl.password": "${EXFM_TEST_PASSWORD}", "security.protocol": "SSL"},
    )
    monkeypatch.delenv("EXFM_TEST_PASSWORD", raising=False)
    with pytest.raises(
        UserError,
        match=r"sasl.password is \$\{EXFM_TEST_PASSWORD\}, which the environment does not have",
    ):
        config.resolved()
    monkeypatch.setenv("EXFM_TEST_PASSWORD", "hunter2")
    assert config.resolved() == {"sasl.password": "hunter2", "security.protocol": "SSL"}
    assert "hunter2" not in config.model_dump_json()


@pytest.mark.parametrize("pattern", ["/etc/*.csv", "../labels/*.csv", "a/../../b.csv", ""])
def test_label_files_lie_below_the_root(pattern: str) -> None:
    """Wrong: files elsewhere on the disk are read as labels, or pathlib raises a traceback."""
    with pytest.raises(ValidationError, match=r"does not lie below data.root; set data.root"):
        FollowConfig(labels=pattern)
    assert FollowConfig(labels="labels/..part-*.csv").labels == "labels/..part-*.csv"
