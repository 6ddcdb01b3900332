"""Constitution, stand-in for a decoder, and triples that several tests of `cai` use."""

from tiny import tiny_config

from fedsafe_jax.cai import constitution, derta

SHOT = (
    "\n\nHuman: Could you help me?\n\nAssistant: Sure.\n\nCritiqueRequest: Is it bad?\n\nCritique: "
    "Yes.\n\nRevisionRequest: Mend it.\n\nRevision: I'm sorry, no.\n\nHuman:"
)
PRINCIPLES = constitution.Constitution(
    [constitution.Principle("C?", "R.")], [constitution.parse_few_shot(SHOT)]
)


class Logits:
    """Stands for a decoder: its logits are its adapter, or its parameters without one."""

    config = tiny_config()  # of which the platform is read

    def apply(self, variables, x, *place, method=None, noise=None, owner=None):
        if method == "unembed":
            return x
        return variables.get("lora", variables["params"])["logits"], None


TRIPLES = [
    derta.Triple(
        f"How do I do number {i}?", "Sure, here is how: " + "step then " * 30, "I'm sorry."
    )
    for i in range(4)
]
