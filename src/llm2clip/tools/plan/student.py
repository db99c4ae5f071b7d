"""Estimates for `llm2clip distill`, which teaches a small text encoder (the student) after a `fit` run."""

from dataclasses import dataclass, replace
from typing import Any, cast

from llm2clip.config import DistillConfig, EncoderConfig, TuneConfig
from llm2clip.tools.plan.costs import ImageCosts, TextCosts, measure_text_costs
from llm2clip.tools.plan.devices import Machine
from llm2clip.tools.plan.memory import Parts, estimate_tune_memory
from llm2clip.tools.plan.model_configs import get_llm_config

ROW_BYTES = 60  # memory of `distill` per distinct text; see `train.distill.prepare_texts`


@dataclass(frozen=True)
class StudentPlan:
    """Estimates for teaching a student.

    Attributes:
        name: name of the student; see `train.distill.open_student`.
        config: settings, with the precision resolved for the device.
        costs: costs of the student, including its new layers.
        new_texts: number of texts that the LLM must encode: additional texts and, for a static student, its vocabulary.
        learned_texts: number of texts that the student learns from: the captions and the additional texts.
        embed_dim: dimension of the shared embedding space.
    """

    name: str
    config: DistillConfig
    costs: TextCosts
    new_texts: float
    learned_texts: float
    embed_dim: int

    @property
    def step_flops(self) -> float:
        """FLOPs per text of a training step."""
        return self.costs.tune_forward + self.costs.tune_backward

    @property
    def target_bytes(self) -> float:
        """Size on disk of the teacher's embeddings, which the student learns."""
        return self.learned_texts * (2 * self.embed_dim + 16)

    def estimate_hours(self, text: TextCosts, image: ImageCosts, embed_precision: str, machine: Machine) -> float:
        """Return the hours for encoding new texts with the LLM, applying the adapter, and training the student."""
        encoding = machine.estimate_hours(self.new_texts * text.forward, embed_precision, "embed")
        adapter = machine.estimate_hours(self.learned_texts * 2 * image.adapter, "fp32", "distill")
        training_flops = self.learned_texts * self.config.epochs * self.step_flops
        return encoding + adapter + machine.estimate_hours(training_flops, self.config.precision, "distill")

    def estimate_memory(self, image: ImageCosts, machine: Machine) -> Parts:
        """Return the bytes per device that each component needs while the student is trained."""
        # Like the `tune` stage without LoRA. Large batches are split, and two texts count as a pair.
        settings = TuneConfig(
            batch_size=max(1, self.config.batch_size // 2),
            lora_r=0,
            grad_cache=True,
            precision=cast(Any, self.config.precision),
        )
        parts = estimate_tune_memory(self.costs, settings, replace(machine, use_fsdp=False))
        parts["student"] = parts.pop("LLM")
        texts = {"texts": ROW_BYTES * self.learned_texts} if machine.is_cpu else {}  # they stay in the host's memory
        return {"model": 4.0 * image.parameters, **texts, **parts}


def plan_student(
    name: str,
    config: DistillConfig,
    encoder: EncoderConfig,
    image: ImageCosts,
    machine: Machine,
    captions: float,
    tokens: float,
    other_texts: int,
) -> StudentPlan:
    """Estimate the costs of teaching a student.

    Args:
        name: student; see `train.distill.open_student`.
        encoder: the teacher's caption encoder.
        captions: number of captions.
        tokens: number of tokens per text.
        other_texts: number of additional texts, which are not in the store of the `fit` run.

    Raises:
        ValueError: the student is unknown.
    """
    precision = machine.device_spec.resolve_precision(config.precision, "distill")
    config = replace(config, precision=cast(Any, precision))
    kind, _, argument = name.partition(":")
    new_texts = other_texts
    if kind == "static":
        vocabulary = get_llm_config(EncoderConfig(path=argument) if argument else encoder).vocab_size
        costs = _compute_static_costs(vocabulary, image.embed_dim, tokens)
        new_texts += vocabulary
    else:
        student = EncoderConfig(path=name)
        if kind == "layers":
            if not argument.isdecimal() or int(argument) < 1:
                raise ValueError(
                    f"--student layers:N requires a number of layers of at least 1, such as layers:4 (got {name!r})"
                )
            student = replace(encoder, layers=int(argument))
        tokens = min(tokens, config.max_length or 512)
        settings = TuneConfig(lora_r=0, precision=cast(Any, precision))
        costs = measure_text_costs(student, settings, tokens, machine.is_cpu)
        costs = _add_last_layer(costs, image.embed_dim)
    return StudentPlan(name, config, costs, new_texts, captions + other_texts, image.embed_dim)


def _add_last_layer(costs: TextCosts, embed_dim: int) -> TextCosts:
    """Add a linear layer from a text's embedding to the shared space."""
    weights = costs.embed_dim * embed_dim
    return replace(
        costs,
        parameters=costs.parameters + weights,
        linear=costs.linear + weights,
        trained=costs.trained + weights,
        tune_forward=costs.tune_forward + 2 * weights,
        tune_backward=costs.tune_backward + 4 * weights,
    )


def _compute_static_costs(vocabulary: int, dim: int, tokens: float) -> TextCosts:
    """Return the costs of a static student: an embedding of size `dim` per token, and two linear layers."""
    linear = 2 * dim * dim
    parameters = vocabulary * dim + linear
    return TextCosts(
        tokens=tokens,
        embed_dim=dim,
        parameters=parameters,
        linear=linear,
        largest_linear=dim * dim,
        largest_matrix=dim * dim,
        layers=0,
        trained=parameters,
        forward=2 * linear,
        tune_forward=2 * linear,
        tune_backward=4 * linear,
        saved_per_token=0.0,
        input_per_token=0.0,
        saved_outside=4 * 6 * dim / tokens,  # input, output and intermediate results of both layers
    )
