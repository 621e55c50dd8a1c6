"""Campaigns on a cluster of one machine."""

import sys

import pytest
from test_campaign import BOTH, NESTED, config, explore, silent

from trapline.base.errors import ExitCode, ToolMissingError, WorkersLostError
from trapline.explore import campaign
from trapline.explore.campaign import Ledger
from trapline.explore.cluster import ClusterWorkers
from trapline.explore.store import Store


def explore_on(address, settings, progress=silent, path=None, *, resume=False):
    with Store.open(path, campaign.identity(settings, "id"), resume=resume) as store:
        ClusterWorkers(settings, address, Ledger(store, settings, progress, chunk=1)).run()
        return campaign.result_of(store, settings, "id")


@pytest.fixture
def cluster():
    distributed = pytest.importorskip("distributed", reason="the extra `cluster` is not installed")
    with distributed.LocalCluster(
        n_workers=2, threads_per_worker=1, dashboard_address=None, silence_logs="CRITICAL"
    ) as local:
        yield local


@pytest.mark.filterwarnings("ignore")  # of dask's and tornado's own
def test_a_cluster_finds_what_one_worker_finds(cluster):
    for text in (BOTH, NESTED):  # two campaigns in the same processes
        assert explore_on(cluster.scheduler_address, config(text=text)) == explore(
            config(text=text)
        )


@pytest.mark.filterwarnings("ignore")
def test_a_cluster_that_goes_away_loses_nothing(cluster, tmp_path):
    path, settings = tmp_path / "a.db", config()

    def leave(done, _):
        if done == 3:
            cluster.close(timeout=5)

    with pytest.raises(WorkersLostError, match=r"went away .* go on with --resume"):
        explore_on(cluster.scheduler_address, settings, leave, path)
    assert explore(settings, path=path, resume=True) == explore(settings)


@pytest.mark.filterwarnings("ignore")
def test_a_cluster_that_is_not_there():
    pytest.importorskip("distributed", reason="the extra `cluster` is not installed")
    with pytest.raises(
        WorkersLostError, match=r"no dask scheduler answers at tcp://127\.0\.0\.1:9"
    ):
        explore_on("tcp://127.0.0.1:9", config())


def test_without_the_extra_it_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "distributed", None)
    with pytest.raises(ToolMissingError, match=r"pip install trapline\[cluster\]") as error:
        explore_on("tcp://127.0.0.1:9", config())
    assert error.value.exit_code == ExitCode.TOOL_MISSING
