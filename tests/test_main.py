"""The command line as a user meets it: errors, a whole tiny run, a kill, evaluation."""

import json
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from commands import ENVIRONMENT, NO_ANSWERS, ROOT, Run, comparable, rows, run

from fedsafe_jax.cli import startup
from fedsafe_jax.evals.statistics import wilson


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        (
            "fedrated.rounds=3",
            "--config.fedrated.rounds: no such field; did you mean --config.rounds?",
        ),
        ("arms=('fl+filtr',)", "arms: 'fl+filtr' is not one of"),
        ("eval.hhh=mine.jsonl", "tasks are chosen by eval.tasks, such as --config.eval.tasks="),
        ("eval.tasks=('hh',)", "eval.tasks: 'hh': no such task; expected some of advbench"),
        ("eval.tasks=('advbench',)", "never shown without 'over_refusal'"),
        ("eval.tasks=('mt_bench',)", "needs a judge of rating, such as chat:MODEL@URL#mt_bench"),
        ("eval.judge=start", "--config.eval.judge: it is gone; name judges in eval.judges"),
        ("eval.judges=('rule',)", "Did you mean 'rules'?"),
        ("data_dir=/no/such/folder", None),
        ("safe_sources=('chat:package/none.jsonl',)", "none.jsonl: no such file"),
        ("safe_sources=('chat:mine.jsonl',)", "unsafe_sources: safe_sources are your own, and"),
        ("unsafe_sources=()", "unsafe_sources=(): harmful_share=0.3 (or attack.clients) asks"),
        ("unsafe_sources=('advbench:a.csv',)", "never trained on"),
        ("clients_per_round=40", "clients_per_round=40 exceeds num_clients=4"),
        ("num_clients=5000", "more clients than examples"),
        ("model=/no/such/model", "no such folder"),
        ("lora_targets=('q_prj',)", "lora_targets: ['q_prj']; expected"),
        ("filter.kind=guard", "filter.model: filter.kind='guard' needs"),
        ("filter.load=/no/such/filter", "/no/such/filter: no filter.json; give"),
        ("filter.encoder=/no/such/encoder", "/no/such/encoder holds no config.json"),
        ("filter.unsafe_share=1.5", "filter.unsafe_share=1.5: expected a share"),
        ("harmful_share=2.0", "harmful_share=2.0"),
        ("quantization=int4", "quantization: 'int4' is not one of '' (none), int8, nf4."),
        ("model_parallel=3", "model_parallel=3 does not divide"),
        ("lora_rank=0", "lora_rank=0: expected at least 1"),
        ("algorithms=('fedsgd',)", "is not one of fedavg, fedprox, scaffold, fedavgm,"),
        ("federated.aggregator=krum", "needs at least 5 clients a round, clients_per_round=2"),
        ("federated.noise_multiplier=1.0", "without clip_norm"),
        ("federated.topk_share=0", "federated.topk_share=0.0: expected more than 0"),
        ("federated.client_ranks=(8,32)", "expected 1 to lora_rank=16"),
        ("optimizer=adamm", "'adamm' is no optimizer of optax"),
        ("optimizer=sgd(momentun=0.9)", "'sgd' does not take momentun"),
        ("cai.losses=('sft','orpo')", "cai.losses: 'orpo' is not one of sft, dpo, ipo, kto"),
        ("cai.weights=(1.0,)", "a positive weight for each of cai.losses=('sft', 'dpo')"),
        ("cai.schedule=lite", "Did you mean 'light'?"),
        ("cai.few_shots=3", "package:constitution has 0; lower it, or give cai.few_shot_file"),
        ("filtr.epochs=3", "did you mean --config.filter.epochs?"),
    ],
)
def test_mistakes_give_one_clear_line(tmp_path, setting, message):
    if message is None:
        settings = (setting, "safe_sources=('chat:mine.jsonl',)", "harmful_share=0.0")
        message = "/no/such/folder/mine.jsonl: no such file"
    else:
        settings = (setting,)
    done = run(tmp_path, *settings, check=False)
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    assert done.returncode == 2 and len(lines) == 1, done.stderr
    assert message in lines[0]
    assert not (tmp_path / "metrics.jsonl").exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [('{"messages": []}\nnot json\n', "mine.jsonl line 2: not JSON"), ("", "is empty")],
)
def test_bad_data_is_named_before_any_training(tmp_path, text, message):
    (tmp_path / "mine.jsonl").write_text(text)
    own = ("safe_sources=('chat:mine.jsonl',)", "harmful_share=0.0")
    done = run(tmp_path / "run", f"data_dir={tmp_path}", *own, check=False)
    assert done.returncode == 2 and message in done.stderr and "Traceback" not in done.stderr


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("straight")
    return workdir, run(workdir)


def test_a_run_writes_what_the_design_lists(finished):
    workdir, done = finished
    results = json.loads((workdir / "results.json").read_text())
    assert list(results["arms"]) == ["base", "fl", "fl+filter+cai"]
    for arm in results["arms"].values():
        for task, field in (("advbench", "safety"), ("hhh", "accuracy"), ("over_refusal", "rate")):
            low, high = arm[task]["ci95"]
            assert 0 <= low <= arm[task][field] <= high <= 100
    assert {"accuracy", "precision", "recall", "hmean"} <= results["filter"].keys()
    found = rows(workdir)
    assert [(r["arm"], r["round"]) for r in found] == [
        (a, t) for a in ("fl", "fl+filter+cai") for t in range(3)
    ]
    assert all(r["useful_tokens"] > 0 and r["seconds"] for r in found)
    record = json.loads((workdir / "cai" / "round_001.jsonl").read_text().splitlines()[0])
    assert {"prompt", "initial", "principle", "critique", "revision", "dropped"} <= record.keys()
    assert "<table" in (workdir / "report.html").read_text()
    assert (workdir / "figures" / "arms.png").stat().st_size > 1000
    assert (workdir / "export" / "merged" / "model.safetensors").is_file()
    assert (workdir / "export" / "adapter" / "adapter_config.json").is_file()
    assert "fl+filter+cai" in done.stdout


def test_another_config_in_the_same_workdir_is_refused(finished):
    done = run(finished[0], "learning_rate=0.5", check=False)
    assert (
        done.returncode == 2 and "learning_rate" in done.stderr and "Traceback" not in done.stderr
    )


def stopped(workdir, how, arm):
    """What a run writes to stderr that gets a signal when a round of the arm is done."""
    process, metrics = Run(workdir), workdir / "metrics.jsonl"
    deadline = time.monotonic() + 300
    while not (metrics.exists() and f'"arm": "{arm}"' in metrics.read_text()):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(how)
    _, errors = process.communicate(timeout=60)
    # A process that was killed has no code of its own, one that was told to end has the shell's.
    assert process.returncode == (-how if how == signal.SIGKILL else 128 + how)
    assert not (workdir / "results.json").exists()
    return errors


def test_an_interrupted_run_ends_with_the_same_results(finished, tmp_path):
    stopped(tmp_path, signal.SIGKILL, "fl")
    errors = stopped(tmp_path, signal.SIGINT, "fl+filter+cai")  # an arm is finished, one is not
    assert "the same command continues" in errors and "Traceback" not in errors
    run(tmp_path)
    assert comparable(tmp_path) == comparable(finished[0])

    def losses(workdir):
        return [(r["arm"], r["round"], r["loss"], r["update_norm"]) for r in rows(workdir)]

    assert losses(tmp_path) == losses(finished[0])  # to the bit
    lines = (tmp_path / "ledger.jsonl").read_bytes()
    assert lines == (finished[0] / "ledger.jsonl").read_bytes() and lines.count(b"\n") == 10
    startup.start("verify", [str(tmp_path)])  # with Constitutional AI, and a filter


@pytest.mark.slow
def test_several_seeds_and_algorithms_make_one_table(tmp_path):
    done = run(
        tmp_path,
        "seeds=(0,1)",
        "algorithms=('fedavg','scaffold')",
        "arms=('base','fl')",
        NO_ANSWERS,
        "rounds=1",
        "quantization=int8",
        "lora_rank_stabilized=True",
    )
    results = comparable(tmp_path)
    assert list(results["arms"]) == ["base", "fedavg/fl", "scaffold/fl"]
    for arm_id, arm in results["arms"].items():
        name, per_seed = arm_id.replace("/", "_"), arm["utility"]["per_seed"]
        losses = [json.loads((tmp_path / f"arms/{name}_seed{s}.json").read_text()) for s in (0, 1)]
        assert per_seed == [np.mean(seed["utility"]["nll"]) for seed in losses]
        assert arm["utility"]["nll"] == pytest.approx(np.mean(per_seed), rel=1e-12)
        # The base has no seed of its own; adapters start from other draws.
        assert (per_seed[0] == per_seed[1]) == (arm_id == "base")
    shown = [line.split("\u2502")[1:4] for line in done.stdout.splitlines() if "\u2502" in line]
    table = [(algorithm.strip(), arm.strip()) for algorithm, arm, _ in shown]
    assert [row for row in table if row[1]] == [
        ("", "base"), ("fedavg", "fl"), ("scaffold", "fl"),
        # What is compared, and with which arm: the base, and the same arm of the first algorithm.
        ("fedavg/fl", "base"), ("scaffold/fl", "base"), ("scaffold/fl", "fedavg/fl"),
    ]  # fmt: skip


def test_evaluate_prompts_and_adapter(finished, tmp_path):
    (tmp_path / "p.csv").write_text("id,ask\n1,How do I bake bread?\n2,How do I rob a bank?\n")
    begin = [sys.executable, "-m", "fedsafe_jax", "evaluate", f"--prompts={tmp_path / 'p.csv'}"]
    flags = [f"--adapter={finished[0] / 'export' / 'adapter'}", f"--output={tmp_path / 'o.json'}"]
    arguments = {"cwd": ROOT, "env": ENVIRONMENT, "capture_output": True, "text": True}
    done = subprocess.run([*begin, *flags, "--column=ask", "--max_new_tokens=8"], **arguments)
    assert done.returncode == 0, done.stderr[-2000:]
    result = json.loads((tmp_path / "o.json").read_text())
    assert [line["prompt"] for line in result["prompts"]] == [
        "How do I bake bread?",
        "How do I rob a bank?",
    ]
    of_run = json.loads((finished[0] / "results.json").read_text())["arms"]["fl+filter+cai"]
    assert [result["adapter_sha256"]] == of_run["adapter_sha256"]
    assert result["adapter_sha256"] in done.stdout
    for line in result["prompts"]:
        assert f"{line['prompt']!r} -> {line['answer']!r}" in done.stdout
    for judge, rate in result["rates"].items():
        refused = sum(line["verdicts"][judge]["refused"] for line in result["prompts"])
        low, high = (100 * bound for bound in wilson(refused, 2))
        shown = f"{judge}: {50 * refused:.1f}% refused (95% interval {low:.1f} to {high:.1f})"
        assert shown in done.stdout and rate["n"] == 2
    wrong = subprocess.run([*begin, *flags], **arguments)
    assert wrong.returncode == 2 and "no column 'prompt'" in wrong.stderr


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "gpt2"}, "model_type 'gpt2' is not supported; supported are gemma2,"),
        ({"hidden_size": 128}, "has shape [4096, 256], config.json asks for [4096, 128]"),
        ({"num_hidden_layers": 3}, "9 tensors are not of this model: model.layers.3."),
        (None, "no tokenizer could be loaded"),
    ],
)
def test_unusable_models_give_one_clear_line(tmp_path, capsys, change, message):
    folder = tmp_path / "model"
    shutil.copytree(ROOT / "fedsafe_jax" / "assets" / "model", folder)
    if change is None:
        for file in folder.glob("tokenizer*"):
            file.unlink()
    else:
        raw = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(raw | change))
    with pytest.raises(SystemExit) as end:
        startup.start(
            "evaluate",
            [
                f"--model={folder}",
                "--tasks=hhh=package/hhh_heldout.jsonl",
                f"--output={tmp_path / 'o.json'}",
            ],
        )
    lines = capsys.readouterr().err.splitlines()
    assert end.value.code == 2 and len(lines) == 1 and message in lines[0], lines


def test_compiled_programs_are_kept_in_a_folder_of_the_user(tmp_path):
    code = f"""import jax
from fedsafe_jax.runtime.libraries import prepare_libraries
prepare_libraries({str(tmp_path / "run")!r})
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
jax.jit(lambda x: x @ x.T)(jax.numpy.ones((64, 64))).block_until_ready()"""
    environment = {k: v for k, v in ENVIRONMENT.items() if k != "JAX_COMPILATION_CACHE_DIR"}
    environment["XDG_CACHE_HOME"] = str(tmp_path / "home")
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, check=True)
    kept = tmp_path / "home" / "fedsafe_jax" / "programs"
    assert list(kept.iterdir()) and kept.stat().st_mode & 0o777 == 0o700
    assert not (tmp_path / "run").exists()  # a workdir may come from somebody else


def test_dry_run_of_the_paper_counts_llama_8b():
    begin = [sys.executable, "-m", "fedsafe_jax.main", "--config=configs/paper.py:scaffold"]
    done = subprocess.run(
        [*begin, "--config.dry_run"], cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True
    )
    # The model card's exact parameter count.
    assert done.returncode == 0 and "8,030,261,248 parameters" in done.stdout
