"""The border of the commands: a mistake is a line and code 2, a bug a traceback; help, version."""

import json
import re
import subprocess
import sys
import types

import pytest
from commands import ENVIRONMENT, ROOT

import fedsafe_jax
from fedsafe_jax.cli import command, startup
from fedsafe_jax.config import default_config
from fedsafe_jax.data.examples import SourceError

DEMO = "--config=configs/demo.py"
MINILM = "--config=configs/filter_minilm.py:scratch"
PRETRAIN = "--config=configs/pretrain_demo.py"


def fedsafe(*arguments, begin=("-m", "fedsafe_jax"), **options):
    return subprocess.run(
        [sys.executable, *begin, *map(str, arguments)],
        env=ENVIRONMENT | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=300,
        **({"cwd": ROOT} | options),
    )  # fmt: skip


def refused(capsys, name, *arguments):
    """The one line that a command ends with, called in this process."""
    with pytest.raises(SystemExit) as end:
        startup.start(name, [str(a) for a in arguments])
    out, errors = capsys.readouterr()
    assert end.value.code == 2 and out == ""
    assert errors.startswith("error: ") and errors.count("\n") == 1, errors
    return errors.removeprefix("error: ").rstrip()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("evalute",), "'evalute' is no command; did you mean 'evaluate'?"),
        (("x",), "'x' is no command; expected one of run, evaluate, attack, judge, train-judge,"),
        (("",), "give a command; expected one of run,"),
        (("run",), "--config: give a config file, such as --config=configs/demo.py"),
        (("run", "--config"), "--config: give a config file, such as --config=configs/demo.py"),
        (("run", DEMO), "--workdir: give a folder for the run"),
        (("run", "--config=no/such.py"), "--config=no/such.py: no such file."),
        (("run", "--config=configs"), "--config=configs: no such file."),
        (("run", "--config=README.md"), "--config=README.md: expected a Python file, NAME.py."),
        (("run", f"{DEMO}:x"), "configs/demo.py takes no argument after the colon."),
        (("run", "--config=configs/lab.py:x"), "configs/lab.py:x: expected nothing or 'smoke'"),
        (("run", MINILM), "is a config of `fedsafe train-filter`; `fedsafe run` reads one such as"),
        (("run", PRETRAIN), "is a config of `fedsafe pretrain`;"),
        (("train-filter", DEMO), "is a config of `fedsafe run`; `fedsafe train-filter` reads"),
        (("pretrain", DEMO), "`fedsafe pretrain` reads one such as configs/pretrain_demo.py."),
        (("run", DEMO, "--workdr=a"), "Unknown command line flag 'workdr'. Did you mean: workdir"),
        (("run", DEMO, "--config.cai.stps=3"), "did you mean --config.cai.steps?"),
        (("run", DEMO, "--noconfig.remt"), "did you mean --config.remat?"),
        (("run", DEMO, "--config.rounds=many"), "flag --config.rounds=many: invalid literal"),
        (("run", DEMO, "--config.rounds=0", "--workdir=a"), "rounds=0: expected at least 1."),
        (("run", DEMO, "--config.remat", "False"), "unexpected argument 'False'; flags are"),
        (("run", "--help=cay"), "--help=cay: no such group; did you mean 'cai'?"),
        (("evaluate", "--help=cai"), "--help=cai: no such group; there are no groups"),
        (("train-filter", MINILM), "--workdir: missing; `fedsafe train-filter --help` lists"),
        (("train-filter", MINILM, "--workdir=a", "--config.epoch=1"), "mean --config.epochs?"),
        (("train-filter", MINILM, "--workdir=a", "--config.kind=odd"), "filter.kind: 'odd' is not"),
        (("pretrain", PRETRAIN), "--output: missing; `fedsafe pretrain --help` lists the flags."),
        (("filter", "--filter=a", "--input=b"), "--output: missing; `fedsafe filter --help`"),
        (("filter", "--action=dorp"), "value should be one of <drop|"),
        (("evaluate", "--tasks=advbnch"), "--tasks: 'advbnch': no such task; expected some of"),
        (("evaluate", "--model=/no/such"), "model '/no/such': no such folder"),
        (("evaluate", "--tasks=mt_bench"), "needs a judge of rating, such as chat:MODEL@URL#mt"),
        (("evaluate", "--decoding=buget"), "decoding: 'buget'"),
        (("evaluate", "--decoding=budget"), "reads the risk of answers: name a guard, such as"),
        (("evaluate", "--guardian=x"), "guardian 'x': no filter.json there; give a folder"),
        (("serve", "--model=package:model", "--decoding=budget"), "name a guard, such as"),
        (("serve", "--guardian=x", "--guard=package:model#llama-guard"), "guardian 'x': no filter"),
        (("run", DEMO, "--workdir=a", "--config.eval.decoding=budget"), "eval: decoding 'budget'"),
        (("train-critic", "--sources=x", "--guard=rules", "--output=a"), "does not tell harm"),
        (("evaluate", "--judges=chat"), "--judges: judge 'chat': write chat:MODEL@URL#RUBRIC."),
        (("evaluate", "--judges=chat:a"), "write chat:MODEL@URL#RUBRIC, such as"),
        (("evaluate", "--base=a"), "--base: add a judge that compares, chat:MODEL@URL#compare"),
        (("evaluate", "--tasks="), "--tasks: give some of advbench, over_refusal, hhh, utility"),
        (("evaluate", "--tasks=hhh", "--prompts=a"), "--prompts and --tasks: give one of them."),
        (("run", DEMO, "--config.export_arm=fl+fitler", "--workdir=a"), "mean 'fl+filter'?"),
        (("evaluate", "--tasks=utility"), "the pairs that a run holds out; give utility=SOURCE."),
        (("evaluate", "--tasks=advbench"), "'advbench' is never shown without 'over_refusal'"),
        (("evaluate", "--output=configs"), "--output=configs: is a folder; name a file."),
        (("evaluate", "--batch_size=0"), "flag --batch_size=0"),
        (("revise", "--prompts=a"), "--output: missing; `fedsafe revise --help` lists the flags."),
        (("revise", "--form=odd"), "flag --form=odd: value should be one of <chat|dialogue>"),
    ],
)
def test_mistakes_are_one_line(capsys, monkeypatch, arguments, message):
    monkeypatch.chdir(ROOT)
    assert message in refused(capsys, *arguments)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("def get_config(:", "mine.py line 1: SyntaxError: "),
        ("import no_such_module", "mine.py line 1: ModuleNotFoundError: No module named 'no_such"),
        ("x = 1", "it defines no function get_config()."),
        ("def get_config():\n    return {}", "get_config() returned dict, expected a ConfigDict."),
        ("def get_config(x):\n    return x", "mine.py needs an argument after the colon."),
        ("def get_config():\n\n    return 1 / 0", "mine.py line 3: ZeroDivisionError: division"),
        ("{}\n    c.romds = 3\n    return c", "did you mean --config.rounds?"),
        ("{}\n    del c.seeds\n    return c", "no field 'seeds' (1 of run's fields are missing)"),
        ("{}\n    c.rounds.x = 3\n    return c", "mine.py line 4: AttributeError: 'int' object"),
    ],
)
def test_config_files_that_cannot_be_used(capsys, tmp_path, text, message):
    begin = "from fedsafe_jax.config import default_config\ndef get_config():\n"
    (tmp_path / "mine.py").write_text(text.replace("{}\n", begin + "    c = default_config()\n"))
    assert message in refused(capsys, "run", f"--config={tmp_path / 'mine.py'}", "--workdir=a")


def test_output_that_cannot_be_written(capsys, tmp_path):
    (tmp_path / "file").write_text("")
    below = tmp_path / "file" / "below"
    for name, *flags in (
        ("run", DEMO, f"--workdir={below}"),
        ("run", DEMO, f"--workdir={tmp_path / 'file'}"),
        ("train-filter", MINILM, f"--workdir={below}"),
        ("pretrain", PRETRAIN, f"--output={below}"),
        ("evaluate", f"--output={below}"),
        ("filter", "--filter=a", "--input=b", f"--output={below}"),
        ("revise", "--prompts=a", f"--output={below}"),
    ):
        assert "cannot be written (" in refused(capsys, name, *flags)
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def toy(monkeypatch, main):
    """A command whose `main` is given, as `evaluate`."""
    module = types.SimpleNamespace(COMMAND=command.Command(lambda values: None, main))
    monkeypatch.setitem(sys.modules, "fedsafe_jax.cli.evaluate", module)


def test_wrong_input_is_a_line_and_a_bug_a_traceback(capsys, monkeypatch):
    def wrong(values):
        raise SourceError("a.jsonl line 2:\n  not JSON")

    def bug(values):
        raise RuntimeError("a bug")

    toy(monkeypatch, wrong)
    assert refused(capsys, "evaluate") == "a.jsonl line 2: not JSON"
    toy(monkeypatch, bug)
    with pytest.raises(RuntimeError, match="a bug"):
        startup.start("evaluate", [])


def test_a_bugs_traceback_reaches_the_terminal():
    code = """from fedsafe_jax.cli import startup
from fedsafe_jax.pipeline import dry_run
dry_run.describe = None
startup.start("run", ["--config=configs/demo.py", "--config.dry_run"])"""
    done = fedsafe(begin=("-c", code))
    assert done.returncode == 1 and "Traceback" in done.stderr
    assert "TypeError: 'NoneType' object is not callable" in done.stderr


def test_flags_come_in_all_of_absls_forms(tmp_path):
    (tmp_path / "flags").write_text("--config.rounds=2\n")
    values = startup.parse(
        "run",
        command.load("run"),
        ["--config.cai.steps=3", "--workdir", "a", "--config", "configs/lab.py:smoke",
         "--config.arms=('fl',)", "--noconfig.remat", "-config.seq_len", "32",
         f"--flagfile={tmp_path / 'flags'}"],
    )  # fmt: skip
    c = values.config
    assert values.workdir == "a" and c.is_locked
    assert (c.cai.steps, c.seq_len, c.rounds, c.arms, c.remat) == (3, 32, 2, ("fl",), False)
    assert c.num_clients == 20 and len(c.seeds) == 1  # of lab.py:smoke
    wanted = ["--prompts=a", "--output", "b", "--only_wrong", "--few_shots", "2"]
    values = startup.parse("revise", command.load("revise"), wanted)
    assert (values.only_wrong, values.few_shots, values.output) == (True, 2, "b")
    values = startup.parse("revise", command.load("revise"), [*wanted, "--noonly_wrong"])
    assert not values.only_wrong
    values = startup.parse("evaluate", command.load("evaluate"), ["--tasks=hhh,utility"])
    assert values.tasks == ["hhh", "utility"]


def test_a_commands_page_lists_flags_and_fields(capsys):
    for name in command.COMMANDS:
        startup.start(name, ["--workdir=a", "--help"])
        page = capsys.readouterr().out
        assert page.startswith(f"fedsafe {name}: ") and "flags:" in page
        loaded = command.load(name)
        for flag in loaded.required:
            assert f"--{flag}=" in page and "(required)" in page
        for field in loaded.config.fields() if loaded.config else ():
            assert f"\n  {field.name} = {field.default}" in page
    startup.start("run", ["--help=federated"])
    page = capsys.readouterr().out
    assert "probability that a sampled client never answers" in " ".join(page.split())
    names = [line.split()[0] for line in page.splitlines() if " = " in line]
    assert sorted(names) == sorted(f"federated.{name}" for name in default_config().federated)


def test_the_ways_in_are_one(tmp_path):
    pages = [fedsafe("--help"), fedsafe("--help", begin=("-m", "fedsafe_jax.main"))]
    assert all(page.returncode == 0 and not page.stderr for page in pages)
    for name, entry in command.COMMANDS.items():
        assert f"  {name}" in pages[0].stdout and entry.summary in pages[0].stdout
    assert pages[1].stdout.startswith("fedsafe run: ")
    script = ("-c", "from fedsafe_jax.cli.startup import main; main()")  # the console script's call
    done = fedsafe("--version", begin=script)
    assert done.stdout == f"fedsafe_jax {fedsafe_jax.__version__}\n" and done.returncode == 0
    # A config of the repository is found from another folder; what is wrong is told on one line.
    done = fedsafe("run", DEMO, "--config.rounds=0", "--workdir=a", cwd=tmp_path)
    assert done.returncode == 2 and done.stderr == "error: rounds=0: expected at least 1.\n"
    assert list(tmp_path.iterdir()) == []


def test_evaluate_works_as_it_is(tmp_path):
    small = ("--max_prompts=2", "--max_new_tokens=4")
    done = fedsafe("evaluate", *small, f"--output={tmp_path / 'new' / 'o.json'}", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert re.fullmatch(r"devices: \d+ x cpu\n", done.stderr), done.stderr
    lines = [line.split(":")[0] for line in done.stdout.splitlines()]
    both = "advbench beside over_refusal"
    assert sorted(lines) == [
        "advbench", both, "hhh", "mean (95% interval)", "over_refusal", "seconds"
    ]  # fmt: skip
    results = json.loads((tmp_path / "new" / "o.json").read_text())
    assert results["model"] == "package:model" and results["summary"]["advbench"]["n"] == 2


def test_ctrl_c_is_a_line(capsys, monkeypatch):
    def interrupted(values):
        raise KeyboardInterrupt

    loaded = command.load("evaluate")._replace(main=interrupted)
    monkeypatch.setattr(startup, "load", lambda name: loaded)
    with pytest.raises(SystemExit) as end:
        startup.start("evaluate", [])
    assert end.value.code == 130 and capsys.readouterr().err.strip() == "interrupted"


def test_storage_that_does_not_answer_is_a_line_that_may_be_tried_again(monkeypatch, capsys):
    """Exit code 1: launch scripts start a run again after it, and not after wrong input (2)."""
    from fedsafe_jax.runtime.checkpoint import CheckpointError

    def fail(name):
        raise CheckpointError("checkpoint gs://bucket/2 cannot be reached")

    monkeypatch.setattr(startup, "load", fail)
    with pytest.raises(SystemExit) as ended:
        startup.start("run", [])
    assert ended.value.code == 1
    assert capsys.readouterr().err == "error: checkpoint gs://bucket/2 cannot be reached\n"
