"""Whole rounds against an independent torch + peft loop on the same batches."""

import jax
import numpy as np
import pytest
from tiny import tiny_config

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")

from federation import LORA, close  # noqa: E402

from fedsafe_jax.data.packing import Batch  # noqa: E402
from fedsafe_jax.federated import aggregation, algorithms, simulation  # noqa: E402
from fedsafe_jax.federated.algorithms import Hyperparameters  # noqa: E402
from fedsafe_jax.federated.client import LocalTraining, make_optimizer  # noqa: E402
from fedsafe_jax.federated.mesh import make_mesh  # noqa: E402
from fedsafe_jax.federated.participation import Cohort  # noqa: E402
from fedsafe_jax.federated.round_programs import RoundSpec, make_round  # noqa: E402
from fedsafe_jax.models import hub, lora, loss  # noqa: E402
from fedsafe_jax.models.decoder import Decoder  # noqa: E402

CLIENTS, STEPS, ROWS, SEQ, RATE = 3, 3, 2, 12, 5e-3
LARGE_RATE = 2.0  # of plain SGD, such that products of factors differ from those of their means
WEIGHTS = np.array([10.0, 20.0, 30.0])
HYPERPARAMETERS = Hyperparameters(prox_mu=0.3, adaptive_learning_rate=5e-3)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """A tiny Llama made by transformers, loaded here, with batches for three clients."""
    from transformers import LlamaConfig, LlamaForCausalLM

    folder, tiny = tmp_path_factory.mktemp("llama"), tiny_config()
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=tiny.vocab_size, hidden_size=tiny.hidden_size, num_hidden_layers=2,
        intermediate_size=tiny.intermediate_size, num_attention_heads=4, num_key_value_heads=2,
        max_position_embeddings=64, tie_word_embeddings=False,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    config = hub.read_config(folder)
    params = hub.load_params(folder, config, "float32")
    adapter = lora.init(jax.random.key(1), config, LORA)
    rng, shape = np.random.default_rng(0), (CLIENTS, STEPS, ROWS, SEQ)
    tokens = rng.integers(3, 97, shape).astype(np.int32)
    targets = np.roll(tokens, -1, axis=-1)
    mask = (rng.random(shape) < 0.7).astype(np.float32)
    mask[..., -1] = 0
    positions = np.broadcast_to(np.arange(SEQ, dtype=np.int32), shape).copy()
    batches = Batch(
        tokens, targets, mask, segment_ids=np.ones(shape, np.int32), positions=positions
    )
    return folder, config, params, adapter, batches


def ours(inputs, name, optimizer, rounds=2, rate=RATE):
    _, config, params, adapter, batches = inputs
    training = LocalTraining(loss.PackedLoss(Decoder(config, LORA.scale)), optimizer)
    algorithm = algorithms.make(name, training, CLIENTS, HYPERPARAMETERS)
    spec = RoundSpec(algorithm, aggregation.make("mean"))
    programs = make_round(spec, make_mesh(jax.devices()[:1]))
    state = simulation.initial_state(programs, adapter, CLIENTS)
    ids = np.arange(CLIENTS, dtype=np.int32)
    cohort = Cohort(
        ids, WEIGHTS.astype(np.float32), np.full(CLIENTS, STEPS), dropped_out=(), no_data=()
    )
    for _ in range(rounds):
        state, report = simulation.run_round(
            programs,
            state,
            params,
            batches=lambda a, b: jax.tree.map(lambda x: x[a:b], batches),
            cohort=cohort,
            rates=[rate] * STEPS,
            key=jax.random.key(0),
            chunk=CLIENTS,
        )
    return state, report


class Reference:
    """The federation as a plain loop over torch clients."""

    def __init__(self, inputs, tmp_path):
        from transformers import AutoModelForCausalLM

        folder, _, _, adapter, self.batches = inputs
        lora.save_adapter(lora.Adapter(adapter, LORA, str(folder)), tmp_path)
        base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        self.model = peft.PeftModel.from_pretrained(base, tmp_path, is_trainable=True)
        self.named = [(n, p) for n, p in self.model.named_parameters() if p.requires_grad]
        self.weights = [p for _, p in self.named]
        self.x = [p.detach().clone() for p in self.weights]

    def loss(self, client, step):
        batch = [torch.tensor(np.asarray(f[client, step])) for f in self.batches]
        tokens, targets, mask = batch[0].long(), batch[1].long(), batch[2]
        logits = self.model(input_ids=tokens).logits
        nll = torch.nn.functional.cross_entropy(
            logits.reshape(-1, logits.shape[-1]), targets.reshape(-1), reduction="none"
        )
        return (nll * mask.reshape(-1)).sum() / mask.sum()

    def log_likelihoods(self, client, step):
        """Those of the targets under the factors in the model, and where they are learned."""
        tokens, targets, mask = (
            torch.tensor(np.asarray(f[client, step])) for f in self.batches[:3]
        )
        logits = self.model(input_ids=tokens.long()).logits
        every = torch.log_softmax(logits, -1).gather(2, targets.long()[..., None])[..., 0]
        return every, mask > 0

    def train_constrained(self, client, betas):
        """Trains by SGD on Equation 3 of Qi et al. (2024); the start of the round is aligned."""
        self.set(self.x)
        with torch.no_grad():
            aligned = [self.log_likelihoods(client, step)[0] for step in range(STEPS)]
        optimizer = torch.optim.SGD(self.weights, lr=LARGE_RATE)
        for step in range(STEPS):
            now, learned = self.log_likelihoods(client, step)
            values = []
            for row in range(ROWS):
                place = 0
                for token in range(SEQ):
                    if not learned[row, token]:
                        place = 0
                        continue
                    beta = betas[min(place, len(betas) - 1)]
                    gain = now[row, token] - aligned[step][row, token]
                    values.append(-2 / beta * torch.nn.functional.logsigmoid(beta * gain))
                    place += 1
            self.model.zero_grad()
            torch.stack(values).mean().backward()
            torch.nn.utils.clip_grad_norm_(self.weights, 1.0)
            optimizer.step()
        return [p.detach().clone() for p in self.weights]

    def set(self, values):
        with torch.no_grad():
            for p, x in zip(self.weights, values, strict=True):
                p.copy_(x)

    def train(self, client, make, prox=0.0, correction=None):
        self.set(self.x)
        optimizer, raw = make(self.weights), [torch.zeros_like(p) for p in self.weights]
        for step in range(STEPS):
            optimizer.zero_grad()
            value = self.loss(client, step)
            value.backward()
            for r, p in zip(raw, self.weights, strict=True):
                r += p.grad / STEPS
            for i, p in enumerate(self.weights):
                p.grad += prox * (p.detach() - self.x[i])
                if correction is not None:
                    p.grad += correction[i]
            torch.nn.utils.clip_grad_norm_(self.weights, 1.0)
            optimizer.step()
        return [p.detach().clone() for p in self.weights], raw

    def run(self, name, make, rounds=2):
        share = torch.tensor(WEIGHTS / WEIGHTS.sum(), dtype=torch.float32)
        zeros = [torch.zeros_like(x) for x in self.x]
        c, own = list(zeros), [list(zeros) for _ in range(CLIENTS)]
        m, v = list(zeros), [z + HYPERPARAMETERS.tau**2 for z in zeros]
        s = HYPERPARAMETERS
        for _ in range(rounds):
            ends, changes = [], []
            for k in range(CLIENTS):
                correction = None
                if name == "scaffold":
                    correction = [a - b for a, b in zip(c, own[k], strict=True)]
                prox = s.prox_mu if name == "fedprox" else 0.0
                end, raw = self.train(k, make, prox, correction)
                ends.append(end)
                changes.append([r - o for r, o in zip(raw, own[k], strict=True)])
                own[k] = raw
            for i, x in enumerate(self.x):
                delta = sum(w * (end[i] - x) for w, end in zip(share, ends, strict=True))
                if name == "fedadam":
                    m[i] = s.beta1 * m[i] + (1 - s.beta1) * delta
                    v[i] = s.beta2 * v[i] + (1 - s.beta2) * delta**2
                    delta = s.adaptive_learning_rate * m[i] / (v[i].sqrt() + s.tau)
                self.x[i] = x + delta
                c[i] = c[i] + sum(change[i] for change in changes) / CLIENTS
        self.set(self.x)

    def train_some(self, client, start, indices):
        """Trains some of the factors by SGD; PEFT's list has A and B of each layer in turn."""
        self.set(start)
        some = [self.weights[i] for i in indices]
        optimizer = torch.optim.SGD(some, lr=LARGE_RATE)
        for step in range(STEPS):
            self.model.zero_grad()
            self.loss(client, step).backward()
            torch.nn.utils.clip_grad_norm_(some, 1.0)
            optimizer.step()
        return [p.detach().clone() for p in self.weights]

    def run_lora_method(self, name, rounds=2):
        """Runs the method as its paper writes it: FedEx's residue is added to the dense base."""
        share = torch.tensor(WEIGHTS / WEIGHTS.sum(), dtype=torch.float32)
        every = range(len(self.x))
        of_a, of_b = (
            [i for i, (n, _) in enumerate(self.named) if letter in n]
            for letter in ("lora_A", "lora_B")
        )
        own = [list(self.x) for _ in range(CLIENTS)]
        for t in range(rounds):
            trained = {"ffa_lora": of_b, "rolora": (of_b, of_a)[t % 2]}.get(name, every)
            shared = of_a if name == "fedsa_lora" else trained
            ends = []
            for k in range(CLIENTS):
                start = [self.x[i] if i in shared or name != "fedsa_lora" else own[k][i]
                         for i in every]  # fmt: skip
                ends.append(self.train_some(k, start, trained))
            own = ends
            for i in shared:
                self.x[i] = sum(w * end[i] for w, end in zip(share, ends, strict=True))
            if name == "fedex_lora":
                for i, j in zip(of_a, of_b, strict=True):
                    module = self.named[i][0].split(".lora_A")[0]
                    assert self.named[j][0].startswith(module)
                    mean = sum(w * end[j] @ end[i] for w, end in zip(share, ends, strict=True))
                    residue = LORA.scale * (mean - self.x[j] @ self.x[i])
                    with torch.no_grad():
                        self.model.get_submodule(module).base_layer.weight += residue
        return own

    def merged(self, values):
        """Returns the weights of the adapted layers with base and adapter in one, in order."""
        self.set(values)
        layers = [m for m in self.model.modules() if isinstance(m, peft.tuners.lora.Linear)]
        return [(m.base_layer.weight + m.get_delta_weight("default")).detach() for m in layers]


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
@pytest.mark.parametrize("name", ["fedavg", "fedprox", "scaffold", "fedadam"])
def test_two_rounds_equal_torch_and_peft(inputs, tmp_path, name, optimizer):
    reference = Reference(inputs, tmp_path / "start")
    if optimizer == "adamw":
        # eps well above rounding: Adam divides by it where a gradient is zero but for that.
        make = lambda w: torch.optim.AdamW(w, lr=RATE, eps=1e-6, weight_decay=0.01)  # noqa: E731
        state, _ = ours(inputs, name, make_optimizer("adamw(eps=1e-6, weight_decay=0.01)"))
    else:
        make = lambda w: torch.optim.SGD(w, lr=RATE)  # noqa: E731
        state, _ = ours(inputs, name, make_optimizer("sgd"))
    adapter = state.server.factors
    reference.run(name, make)
    reference.model.save_pretrained(tmp_path / "end")
    expected = lora.load_adapter(tmp_path / "end").factors
    close(adapter, expected, atol=1e-4 if optimizer == "adamw" else 1e-6)
    moved = jax.tree.map(lambda a, b: np.abs(a - b).max(), adapter, inputs[3])
    assert max(jax.tree.leaves(moved)) > 10 * (1e-4 if optimizer == "adamw" else 1e-6)


@pytest.mark.parametrize("name", ["ffa_lora", "rolora", "fedsa_lora", "fedex_lora"])
def test_two_rounds_of_a_lora_method_equal_torch(inputs, tmp_path, name):
    """Base and adapter in one are compared, layer by layer: q is square, v is not."""
    reference = Reference(inputs, tmp_path)
    start = reference.merged(reference.x)
    own = reference.run_lora_method(name)
    state, _ = ours(inputs, name, make_optimizer("sgd"), rate=LARGE_RATE)
    adapter, expected = state.server.adapter, reference.x
    if personal := algorithms.ALGORITHMS[name].personal:
        mine = jax.tree.map(lambda x: x[1], state.clients["states"])
        adapter = personal(state.server.factors, mine)
        of_b = ["lora_B" in n for n, _ in reference.named]
        expected = [o if b else x for o, x, b in zip(own[1], reference.x, of_b, strict=True)]
    update = lora.update_of(lora.Adapter(adapter, lora.config_of(adapter, LORA)))
    averaged = lora.update_of(lora.Adapter(state.server.factors, LORA))
    # Of each layer torch lists q_proj before v_proj.
    places = [(layer, n) for layer in range(2) for n in ("q_proj", "v_proj")]
    for (layer, n), old, new in zip(places, start, reference.merged(expected), strict=True):
        ours_ = update(("layers", "self_attn", n, "kernel"), layer).T
        # In float32: the weights, about 0.1, are rounded to 1e-8 themselves, in torch repeatedly.
        np.testing.assert_allclose(ours_, (new - old).numpy(), atol=1e-6)
        assert np.abs(ours_).max() > 1e-4
        if name == "fedex_lora" and n == "v_proj":  # attention hardly depends on q here
            without = averaged(("layers", "self_attn", n, "kernel"), layer).T
            assert np.abs(ours_ - without).max() > 1e-4  # far above the tolerance


def test_two_rounds_of_constrained_fine_tuning_equal_torch(inputs, tmp_path):
    """On the paper's loss itself, of which only the gradient is computed here."""
    reference = Reference(inputs, tmp_path / "start")
    share = torch.tensor(WEIGHTS / WEIGHTS.sum(), dtype=torch.float32)
    for _ in range(2):
        ends = [
            reference.train_constrained(k, HYPERPARAMETERS.constrained_betas)
            for k in range(CLIENTS)
        ]
        reference.x = [
            sum(w * x for w, x in zip(share, xs, strict=True)) for xs in zip(*ends, strict=True)
        ]
    reference.set(reference.x)
    reference.model.save_pretrained(tmp_path / "end")
    expected = lora.load_adapter(tmp_path / "end").factors
    state, _ = ours(inputs, "constrained_sft", make_optimizer("sgd"), rate=LARGE_RATE)
    # Steps are 2 long: six of them add up float32's 1e-7 of factors of about 1.
    close(state.server.factors, expected, atol=5e-6)
    plain, _ = ours(inputs, "fedavg", make_optimizer("sgd"), rate=LARGE_RATE)
    apart = jax.tree.map(lambda a, b: np.abs(a - b).max(), plain.server.factors, expected)
    assert max(jax.tree.leaves(apart)) > 1e-3


def test_ten_steps_of_openfedllms_adamw(inputs, tmp_path):
    """`adamw_hf` against its formula written in torch, eps outside the bias correction."""

    class Hf(torch.optim.Optimizer):
        def __init__(self, params):
            super().__init__(params, {})

        def step(self):
            for group in self.param_groups:
                for p in group["params"]:
                    s = self.state[p]
                    if not s:
                        s.update(t=0, m=torch.zeros_like(p), v=torch.zeros_like(p))
                    s["t"] += 1
                    s["m"].mul_(0.9).add_(p.grad, alpha=0.1)
                    s["v"].mul_(0.999).addcmul_(p.grad, p.grad, value=0.001)
                    size = RATE * (1 - 0.999 ** s["t"]) ** 0.5 / (1 - 0.9 ** s["t"])
                    p.data -= size * s["m"] / (s["v"].sqrt() + 1e-6)

    reference = Reference(inputs, tmp_path / "start")
    reference.run("fedavg", Hf, rounds=3)
    reference.model.save_pretrained(tmp_path / "end")
    state, _ = ours(inputs, "fedavg", make_optimizer("adamw_hf(eps=1e-6)"), rounds=3)
    close(state.server.factors, lora.load_adapter(tmp_path / "end").factors, atol=1e-4)
