"""Exported folders go to the Hub and come from it, here to and from a stand-in on this machine."""

import pytest

import ebt_megatron as ebt
from ebt_megatron.parallel import setup
from tests import shared_models
from tests.sharing import hub_server

constants = pytest.importorskip("huggingface_hub.constants")
PROMPT = "Document 3 says"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    runs = shared_models.text_runs(tmp_path_factory.mktemp("runs"), ["ebt"])
    yield shared_models.exported(runs, tmp_path_factory.mktemp("folders"))["ebt"]
    setup.shutdown()


def use(monkeypatch, endpoint, cache):
    for name in ("HTTPS_PROXY", "https_proxy", "HTTP_PROXY", "http_proxy", "ALL_PROXY", "HF_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", endpoint + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(cache / "no token"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)


def test_a_folder_that_is_pushed_is_loaded_by_its_name(folder, tmp_path, monkeypatch):
    with hub_server.running() as hub:
        use(monkeypatch, hub.url, tmp_path / "cache")
        assert ebt.push_to_hub(folder, "someone/model", token=hub_server.TOKEN) == f"{hub.url}/someone/model"
        assert hub.repos["someone/model"] == {p.name: p.read_bytes() for p in folder.iterdir()}
        assert hub.private["someone/model"]
        theirs = ebt.load("someone/model")
        with pytest.raises(ebt.RecipeError, match=r"someone/other was not uploaded: .*401") as error:
            ebt.push_to_hub(folder, "someone/other", token="hf_not_it")
        with pytest.raises(ebt.RecipeError, match="someone/none: no such folder here, and "):
            ebt.load("someone/none")
    assert "\n" not in str(error.value)
    wanted = ebt.load(folder).generate(PROMPT, max_tokens=5, temperature=0).tokens
    assert theirs.generate(PROMPT, max_tokens=5, temperature=0).tokens == wanted
    assert ebt.load("someone/model").step == 3, "once downloaded it needs no server"


def test_without_a_network_it_is_one_line_at_once(folder, tmp_path, monkeypatch):
    use(monkeypatch, "http://127.0.0.1:9", tmp_path / "cache")
    with pytest.raises(ebt.RecipeError, match=r"^a/b: no such folder here, and http://127.0.0.1:9 cannot be reached"):
        ebt.load("a/b")
    with pytest.raises(ebt.RecipeError, match=r"cannot be reached"):
        ebt.push_to_hub(folder, "a/b")
    with pytest.raises(ebt.RecipeError, match="is not an exported model: ebt-convert export RUN FOLDER first"):
        ebt.push_to_hub(tmp_path, "a/b")
