"""The model card of an export: metadata as the Hub reads it, and text for people."""

from collections.abc import Mapping, Sequence

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from fedsafe_jax.evals.task import EvalSet
from fedsafe_jax.report.rendering import render

TAGS = ("federated", "lora", "fedsafe_jax")
# How an export stands to its base, in the Hub's words, by the library that loads it.
RELATIONS = {"peft": "adapter", "transformers": "finetune"}


def text(
    arm_id: str,
    settings: dict,
    summary: dict,
    sets: Mapping[str, EvalSet],
    license_fields: Mapping[str, str] | None = None,
    note: str = "",
    harmful_share: float | None = None,
    adapter_sha256: str = "",
) -> str:
    """Returns a model card that states base, data, arm and scores.

    Args:
      arm_id: key of the arm in `results.json`.
      settings: the run's config, as in `config.json`.
      summary: the arm's part of `results.json`; {} where nothing was measured.
      sets: the evaluation sets by name.
      license_fields: `license`, and where there are such `license_name` and `license_link`, of the
        base's card; None where not known.
      note: a sentence on what this is, where it is not the arm's final model.
      harmful_share: share of the clients' pairs that is harmful, in [0, 1], as they hold it; None
        where it is not known, and the card says what was asked for.
      adapter_sha256: hash of the adapter that the scores are of, see `models.adapter_hash`; "" to
        leave it out.
    """
    rows = [
        (column.label, cell)
        for name, one in sets.items()
        for column in one.columns
        if (cell := column.cell(summary.get(name, {})))
    ]
    held = harmful_share is not None
    share = harmful_share if held else settings["harmful_share"]
    sources = [*settings["safe_sources"], *settings["unsafe_sources"]]
    measured = _eval_results(summary, sets)
    # A name is that of a model with results: the Hub's metadata has none otherwise.
    named = {"model_name": arm_id, "eval_results": measured} if measured else {}
    data = ModelCardData(
        base_model=settings["model"],
        datasets=_datasets(sources),
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=list(TAGS),
        **named,
        **(license_fields or {}),
    )
    return render(
        "model_card.md",
        metadata=data.to_yaml(),
        arm_id=arm_id,
        settings=settings,
        rows=rows,
        sources=sources,
        note=note,
        adapter_sha256=adapter_sha256,
        harmful=f"{share:.1%} of client data harmful{'' if held else ' as asked for'}",
    )


def for_library(card: str, library: str, base: str = "") -> str:
    """Returns a card for what one library loads, with how to load it.

    Args:
      card: a card from `text`; a text without metadata is returned as it is.
      library: "peft" for the adapter, "transformers" for the merged model.
      base: the base as `adapter_config.json` names it: a Hub id, or an absolute path.
    """
    if not card.startswith("---\n"):
        return card
    parsed = ModelCard(card)
    parsed.data.library_name = library
    parsed.data.base_model_relation = RELATIONS[library]
    use = render(
        "model_use.md", library=library, base=base, base_is_on_the_hub=not base.startswith("/")
    )
    return f"{str(parsed).rstrip()}\n{use}"


def _datasets(sources: Sequence[str]) -> list[str]:
    """The Hub id or file of each source."""
    return list(dict.fromkeys(map(_place, sources)))


def _place(source: str) -> str:
    """A source `reader:location#part` without reader and part."""
    return source.rpartition(":")[2].partition("#")[0]


def _eval_results(summary: Mapping, sets: Mapping[str, EvalSet]) -> list[EvalResult]:
    """The measured figures as the Hub's `model-index`, with their intervals as arguments."""
    return [
        EvalResult(
            task_type="text-generation",
            dataset_type=_place(one.source),
            dataset_name=f"{one.task.title} ({one.source})",
            metric_type=column.field,
            metric_name=column.label,
            metric_value=summary[name][column.field],
            metric_args={"ci95": list(summary[name][column.interval])},
        )
        for name, one in sets.items()
        for column in one.columns
        if summary.get(name, {}).get(column.field) is not None
    ]
