"""A study on a real Ray cluster of two nodes: a worker and a node are lost in the middle, and nothing with them."""

import os
import signal
from collections import Counter
from pathlib import Path

import pytest
import ray
from ray.cluster_utils import Cluster

from lazyllm import InputError
from lazyllm.ablation.engine import StudyCallback
from tests.studies import figures, load, load_and_tell, short_items, small


@pytest.fixture(autouse=True)
def replies_are_short(monkeypatch):
    monkeypatch.setattr("lazyllm.ablation.plan.make_items", short_items)


class Accidents(StudyCallback):
    """Kills a worker at the third result, and the second node at the tenth."""

    def __init__(self, cluster: Cluster, node, pids: Path) -> None:
        self.cluster, self.node, self.pids = cluster, node, pids
        self.records: list = []

    def on_unit(self, record):
        self.records.append(record)
        if len(self.records) == 3:
            os.kill(int(next(self.pids.iterdir()).name), signal.SIGKILL)
        if len(self.records) == 10:
            self.cluster.remove_node(self.node, allow_graceful=False)


@pytest.fixture
def cluster():
    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    yield made
    ray.shutdown()
    made.shutdown()


def test_a_worker_and_a_node_may_be_lost(cluster, tmp_path):
    node = cluster.add_node(num_cpus=1)
    pids = tmp_path / "pids"
    pids.mkdir()
    study = small(model=str(pids), axes=[{"field": "protect.recent", "values": [4, 8, 16]}], tasks={"records": 6})
    expected = figures(study.run(tmp_path / "alone", load=load))
    accidents = Accidents(cluster, node, pids)
    results = study.run(
        tmp_path / "cluster", ray=cluster.address, workers=2, load=load_and_tell, callbacks=[accidents]
    )  # fmt: skip
    assert figures(results) == expected
    assert set(Counter(record.address for record in results.records).values()) == {1}
    assert len(results.records) == 24
    assert len({record.worker for record in results.records}) >= 2


def test_a_cluster_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"no Ray cluster at '127\.0\.0\.1:1'"):
        small().run(tmp_path, ray="127.0.0.1:1", load=load)
