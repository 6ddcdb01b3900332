"""The model card of an export."""


def model_card(config, arm_id: str, summary: dict) -> str:
    """A model card that states base, data, arm and scores."""
    rows = []
    if "advbench" in summary:
        s = summary["advbench"]
        rows.append(f"| harmful prompts refused | {_rate(s['safety'], s['ci95'])} |")
    if "over_refusal" in summary:
        s = summary["over_refusal"]
        rows.append(f"| harmless prompts refused | {_rate(s['rate'], s['ci95'])} |")
    if "hhh" in summary:
        s = summary["hhh"]
        rows.append(f"| HHH accuracy | {_rate(s['accuracy'], s['ci95'])} |")
    if "utility" in summary:
        rows.append(f"| held-out answer loss, nats a token | {summary['utility']['nll']:.3f} |")
    data = ", ".join(f"`{s}`" for s in (*config.safe_sources, *config.unsafe_sources))
    return (
        f"---\nbase_model: {config.model}\nlibrary_name: transformers\n"
        "tags: [federated, lora, fedsafe_jax]\n"
        f"---\n# {arm_id}\n\nFine-tuned by simulated federated learning ({config.rounds} rounds, "
        f"{config.clients_per_round} of {config.num_clients} clients a round, "
        f"{config.harmful_share:.0%} of client data harmful) with fedsafe_jax.\n\n"
        f"Base model: `{config.model}`. "
        f"Client data: {data}.\n\n"
        "| measure | value (95% interval) |\n|---|---|\n" + "\n".join(rows) + "\n"
    )


def _rate(mean: float, interval) -> str:
    return f"{mean:.1f}% ({interval[0]:.1f} to {interval[1]:.1f})"
