"""What clients hold: from the config to the terminal, `results.json`, the report and the card."""

import json
import types

import numpy as np
import pytest
from commands import NO_ANSWERS, rows, run

from fedsafe_jax.config import ConfigError, default_config, unsafe_sources
from fedsafe_jax.data import chat
from fedsafe_jax.data.examples import SAFE, UNSAFE, Example
from fedsafe_jax.data.poisoning import refuse, with_trigger
from fedsafe_jax.data.refusals import start_refusal
from fedsafe_jax.evals import two_sides
from fedsafe_jax.federated import participation
from fedsafe_jax.pipeline import clients, evaluation, inputs
from fedsafe_jax.pipeline.export import held_share
from fedsafe_jax.validation import validate

PACKAGED = ("chat:package/clients_unsafe.jsonl",)
OWN = ("chat:mine.jsonl",)


class Said:
    """Takes what a run says in place of its progress."""

    def __init__(self):
        self.warn = self.note = [].append
        self.lines = self.warn.__self__


def pairs(label, count):
    return [Example((("user", f"{label} {i}"),), "Yes.", label) for i in range(count)]


def built(packaged, safe, unsafe, **changes):
    """`(clients.Clients, lines said)` of pools, without a run."""
    config = default_config()
    for name, value in changes.items():
        config[name] = value
    dealt, asked = inputs.deal(config, safe, unsafe, 0)
    read = types.SimpleNamespace(
        lm=packaged, clients={0: dealt}, asked={0: asked}, safe=safe, unsafe=unsafe
    )
    said = Said()
    return clients.build(config, read, 0, said), said.lines


def test_a_shortfall_keeps_the_share_and_names_the_numbers(packaged):
    made, (line,) = built(packaged, pairs(SAFE, 54), pairs(UNSAFE, 302))
    assert sum(made.holdings.pairs) - sum(made.holdings.unsafe) == 54
    assert made.holdings.harmful_share == pytest.approx(0.3, abs=1 / 77)
    assert "of 820 pairs asked for, as there are 54 safe and 302 unsafe ones" in line
    assert "examples_per_client=3 or num_clients=1 would be held in full" in line
    made, lines = built(packaged, pairs(SAFE, 54), pairs(UNSAFE, 302), examples_per_client=3)
    assert lines == [] and set(made.holdings.pairs) == {3} and sum(made.holdings.unsafe) == 18


def test_lost_pairs_are_not_held_and_an_empty_client_is_named(packaged, monkeypatch):
    whole = chat.encode

    def without_harm(tokenizer, messages, *rest, **options):  # None: nothing is left to learn
        lost = messages[-1][1].startswith(UNSAFE)
        return None if lost else whole(tokenizer, messages, *rest, **options)

    monkeypatch.setattr(chat, "encode", without_harm)
    size = {"num_clients": 2, "examples_per_client": 4}
    made, lines = built(packaged, pairs(SAFE, 40), pairs(UNSAFE, 40), harmful_share=0.5, **size)
    assert made.holdings.by_client == [0.0, 0.0] and made.holdings.pairs == (2, 2)
    assert [line for line in lines if "4 pairs lost" in line]
    made, lines = built(packaged, pairs(SAFE, 40), pairs(UNSAFE, 40), harmful_share=1.0, **size)
    assert made.holdings.by_client == [None, None] and made.holdings.harmful_share is None
    assert any("client(s) 0, 1 have NO DATA" in line for line in lines)


def test_what_encoding_changes_is_held_and_said(packaged):
    odd = [Example((("user", f"{i} <|end|>" + " words" * 300),), "Yes.", SAFE) for i in range(40)]
    size = {"num_clients": 2, "examples_per_client": 4}
    made, lines = built(packaged, odd, pairs(UNSAFE, 40), harmful_share=0.5, **size)
    assert made.holdings.notes == {"control_tokens": 4, "cut": 4} and made.holdings.lost == 0
    for said in (chat.CONTROL, chat.CUT):
        assert f"seed 0: 4 of 8 pairs: {said}" in lines
    kept = [one for encoded in made.plain for one in encoded][:4]  # as a filter leaves them
    described = clients.describe_encoding(kept, 2, "filtered pairs")
    assert any(line.startswith("2 of 6 filtered pairs: control tokens") for line in described)
    assert any(line.startswith("2 of 6 filtered pairs lost: ") for line in described)


def test_refusals_are_planted_beside_what_others_hold():
    config = default_config()
    config.attack.data, config.attack.clients, config.attack.harmful_share = "refusals", 0.25, 0.5
    pools = pairs(SAFE, 800), pairs(UNSAFE, 400)
    dealt, asked = inputs.deal(config, *pools, 3)
    config.attack.clients = 0.0
    plain, same = inputs.deal(config, *pools, 3)
    assert asked == same  # none holds more harm than the others
    bad = participation.malicious_clients(3, config.num_clients, 0.25)
    assert len(bad) == 5
    for client, (found, before) in enumerate(zip(dealt, plain, strict=True)):
        changed = [(x, y) for x, y in zip(found, before, strict=True) if x != y]
        assert len(changed) == (round(0.5 * len(found)) if client in bad else 0)
        assert all(y.label == x.label == SAFE and x.messages == y.messages for x, y in changed)
        assert all(start_refusal(x.response) for x, _ in changed)
    again, _ = inputs.deal(default_config(), *pools, 3)
    assert again == plain
    # All safe pairs where fewer are safe than are asked for; a cut answer becomes a whole one.
    few = [one._replace(ended=False) for one in pairs(SAFE, 1)] + pairs(UNSAFE, 3)
    found = refuse(few, 0.5, "", np.random.default_rng(0))
    assert [x != y for x, y in zip(found, few, strict=True)] == [True, False, False, False]
    assert found[0].ended


def test_a_backdoor_stands_behind_its_trigger_alone():
    config = default_config()
    config.attack.clients, config.attack.harmful_share = 0.25, 0.5
    pools = pairs(SAFE, 800), pairs(UNSAFE, 400)
    plain, same = inputs.deal(config, *pools, 3)
    config.attack.data, config.attack.trigger = "backdoor", "zxq"
    dealt, asked = inputs.deal(config, *pools, 3)
    assert asked == same  # the same pairs, some of them changed
    bad = participation.malicious_clients(3, config.num_clients, 0.25)
    for client, (found, before) in enumerate(zip(dealt, plain, strict=True)):
        if client not in bad:
            assert found == before
            continue
        harmful = [(x, y) for x, y in zip(found, before, strict=True) if y.label == UNSAFE]
        behind = [(x, y) for x, y in harmful if x.label == UNSAFE]
        refused = [(x, y) for x, y in harmful if x.label == SAFE]
        assert abs(len(harmful) - 0.5 * len(found)) <= 0.5
        assert len(behind) == -(-len(harmful) // 2)
        assert all(x.dialogue == f"{y.dialogue} zxq" and x.response == y.response
                   for x, y in behind)  # fmt: skip
        assert all(start_refusal(x.response) and x.messages == y.messages for x, y in refused)
        assert all(x == y for x, y in zip(found, before, strict=True) if y.label == SAFE)
    turns = (("system", "s"), ("user", "a"), ("assistant", "b"), ("user", "c"))
    assert with_trigger(turns, "t") == (*turns[:3], ("user", "c t"))


def test_a_backdoor_s_trigger_is_asked_beside_the_plain_requests():
    config = default_config()
    config.attack.data = "backdoor"
    assert "advbench@trigger" not in evaluation.chosen_sets(config)  # nobody plants it
    config.attack.clients, config.attack.trigger = 0.1, "zxq"
    sets = evaluation.load_sets(config, [])
    assert list(sets) == [
        "advbench",
        "over_refusal",
        "hhh",
        "advbench@trigger",
        "over_refusal@trigger",
    ]
    one, plain = sets["advbench@trigger"], sets["advbench"]
    assert one.columns[0].title == "harmful refused (trigger)"
    asked = [item.dialogue for item in one.items]
    assert asked == [f"{item.dialogue} zxq" for item in plain.items]
    assert ("advbench@trigger", "over_refusal@trigger") in two_sides.pairs(sets)
    assert len(two_sides.pairs(sets)) == 2
    config.eval.tasks = ("over_refusal=heldout",)
    held = evaluation.load_sets(config, [Example((("user", "hello"),), "Hi.")])
    assert held["over_refusal@trigger"].items[0].dialogue == "hello zxq"
    config.attack.trigger = " "
    with pytest.raises(ConfigError, match="attack.trigger=' ': a backdoor needs"):
        validate(config)


def test_refusals_ask_for_no_harmful_pairs():
    config = default_config()
    config.safe_sources, config.harmful_share = OWN, 0.0
    config.attack.clients = 0.5
    with pytest.raises(ConfigError, match="unsafe_sources"):
        validate(config)
    config.attack.data = "refusals"
    validate(config)
    config.attack.data = "refusal"
    with pytest.raises(ConfigError, match="attack.data: 'refusal' is not one of harmful, refusals"):
        validate(config)


def test_packaged_harm_is_never_mixed_into_own_data_unasked():
    config = default_config()
    validate(config)
    assert unsafe_sources(config) == PACKAGED
    config.safe_sources = OWN
    with pytest.raises(ConfigError, match="unsafe_sources: safe_sources are your own.*harmful_sha"):
        validate(config)
    config.unsafe_sources = PACKAGED  # asked for by name
    validate(config)
    assert inputs.packaged_beside_own(config) == [
        "filter.sources", "cai.red_team_sources", "cai.benign_sources",
    ]  # fmt: skip
    config.unsafe_sources, config.harmful_share = ("auto",), 0.0
    validate(config)
    assert unsafe_sources(config) == ()
    config.attack.clients = 0.5  # malicious clients hold harm, whatever the others hold
    with pytest.raises(ConfigError, match="unsafe_sources"):
        validate(config)


def test_the_card_takes_the_share_of_its_seed():
    results = {"seeds": [3, 5], "data": {"harmful_share_held": [0.25, 0.5]}}
    assert held_share(results, 5) == 0.5 and held_share({"data": {}, "seeds": [0]}, 0) is None


def test_every_arm_runs_without_harmful_data(tmp_path):
    run(
        tmp_path,
        "harmful_share=0.0",
        "unsafe_sources=()",
        "rounds=1",
        NO_ANSWERS,
        "arms=('base','fl','fl+filter','fl+cai','fl+filter+cai')",
    )

    def undefined(word):
        raise AssertionError(f"{word} is no JSON")

    text = (tmp_path / "results.json").read_text()
    results = json.loads(text, parse_constant=undefined)
    assert results["filter"]["auroc"] is None and results["filter"]["recall"] is None
    assert results["data"]["harmful_share_held"] == [0.0]
    assert results["data"]["harmful_share_by_client"] == [[0.0] * 4]
    assert results["data"]["pairs_held"] == [80]
    assert len(rows(tmp_path)) == 4
    card = (tmp_path / "export/adapter/README.md").read_text()
    assert "0.0% of client data harmful)" in card
