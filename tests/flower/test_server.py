"""The server of a federation: sites that do not fit, replies that cannot be used, its config."""

import shutil

import numpy as np
import pytest
from commands import rows

pytest.importorskip("flwr")

from flwr.app import Array, ArrayRecord, ConfigRecord  # noqa: E402
from test_flower import ROOT, LocalGrid, exported, node_config, run_config  # noqa: E402

from fedsafe_jax.config import ConfigError  # noqa: E402
from fedsafe_jax.flower import server  # noqa: E402


def test_sites_that_do_not_fit_are_left_out_by_name(folder, tmp_path, capsys):
    other = tmp_path / "model"
    shutil.copytree(ROOT / "fedsafe_jax/assets/model", other)
    (other / "config.json").write_text((other / "config.json").read_text() + " ")
    nodes = [
        node_config(folder, 0),
        node_config(folder, 1) | {"model": str(other)},
        node_config(folder, 0),
        node_config(folder, 7),
        {"client": 2},
        node_config(folder, 2) | {"sources": "chat:absent.jsonl"},
    ]
    with pytest.raises(server.SitesError, match="1 of 3 sites take part"):
        server.run(LocalGrid(nodes), run_config(tmp_path / "run"))
    said = capsys.readouterr().err
    assert "node 101 is left out: client 1's base model differs" in said
    assert "node 102 is left out: the seat of client 0 is node 100's" in said
    for node in (103, 104):
        assert f"node {node} is left out: its operator's --node-config is not valid" in said
    assert "node 105 is left out: its pairs, or the evaluation prompts there, cannot be" in said
    # The text is in each site's log, which is this process's here.
    assert "client=7: this run has num_clients=3" in said and "absent.jsonl" in said


def test_a_description_that_cannot_be_read_is_left_out(folder, tmp_path, capsys):
    said = {100: "no JSON", 101: '{"client": 1}', 102: None}

    def spoil(node, reply):
        if said[node] is not None:
            reply.content["site"] = ConfigRecord({"json": said[node]})
        return reply

    grid = LocalGrid([node_config(folder, i) for i in range(3)], spoil)
    with pytest.raises(server.SitesError, match="1 of 3 sites take part"):
        server.run(grid, run_config(tmp_path / "run"))
    said = capsys.readouterr().err
    assert "node 100 is left out: its reply cannot be read (JSONDecodeError)" in said
    assert "node 101 is left out: its description has no group 'filter'" in said


def test_bad_updates_cost_their_round_alone(folder, tmp_path, capsys):
    def spoil(node, reply):
        if "update" not in reply.content:
            return reply
        arrays = reply.content.array_records["update"]
        name = "update.layers.self_attn.q_proj.a"
        if node == 100:  # an adapter of another rank
            smaller = {
                k: (v.numpy()[..., :-1] if k == name else v.numpy()) for k, v in arrays.items()
            }
            reply.content["update"] = ArrayRecord(
                {k: Array(np.ascontiguousarray(v)) for k, v in smaller.items()}
            )
        if node == 101:  # one number alone
            values = arrays[name].numpy()
            values[0, 0, 0] = np.nan
            arrays[name] = Array(values)
        return reply if node != 102 else None

    grid = LocalGrid([node_config(folder, i) for i in range(3)], spoil)
    settings = run_config(tmp_path, "rounds=1", "arms=('base','fl+filter')", "export_arm=fl+filter")
    server.run(grid, settings | {"round-seconds": 1})
    (row,) = rows(tmp_path)
    assert row["no_answer"] == [0, 2] and row["excluded"] == [1] and row["skipped"]
    assert all(np.all(x == 0) for n, x in exported(tmp_path).items() if "lora_B" in n)
    said = capsys.readouterr().err
    assert "client 0 is left out: array update.layers.self_attn.q_proj.a is float32 [4" in said
    assert "another base model, or lora_rank" in said
    assert "client 2 is left out: no answer in time" in said
    assert "update not finite, left out: client(s) 1" in said and "SKIPPED" in said


def test_what_has_no_meaning_across_sites_is_refused(tmp_path):
    for override, message in (
        ("federated.compression=int8", "federated.compression is not for a federation"),
        ("seeds=(0,1)", "a federation is one run"),
        ("heldout_sources=()", "no client data to hold out"),
        ("roundz=3", "no such field; did you mean --config.rounds?"),
        ("federated.sampling=weighted", "would be drawn every time; use 'uniform'"),
        (
            "federated.aggregator=geometric_median federated.weighting=examples "
            "algorithms=('fedavg',)",
            "half of the weight moves it, and sites say themselves how large they are",
        ),
        ("rounds=two", "rounds='two': expected a value of type int"),
    ):
        with pytest.raises(ConfigError) as error:
            server.read_config(run_config(tmp_path, override))
        assert message in str(error.value)


def test_sizes_that_sites_claim_set_no_weight_by_default(tmp_path):
    config = server.read_config(run_config(tmp_path))
    assert config.federated.weighting == "uniform" and config.federated.min_answers == 2
    overrides = "federated.weighting=examples federated.min_answers=3"
    config = server.read_config(run_config(tmp_path, overrides))
    assert config.federated.weighting == "examples" and config.federated.min_answers == 3


def test_an_error_ends_the_app_such_that_flower_says_it(tmp_path, capsys):
    context = type("Context", (), {"run_config": run_config(tmp_path, "rounds=two")})
    with pytest.raises(server.RunFailed, match="rounds='two': expected a value of type int"):
        server.main(LocalGrid([]), context)
    assert capsys.readouterr().err.startswith("error: rounds='two'")
