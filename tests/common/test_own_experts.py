"""Models with experts of ours against the unmodified library: same logits, gradients and checkpoints."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import (
    AutoModelForSeq2SeqLM,
    PretrainedConfig,
    PreTrainedModel,
    SwitchTransformersEncoderModel,
)
from transformers.models.switch_transformers import modeling_switch_transformers as switch_modeling

from actors.predictor.library_routing import (
    intercepted_routing,
    load_resident_model,
    recorded_router_logits,
)
from common.architecture import describe_architecture, load_config, meta_model, model_class
from common.errors import UnsupportedModelError
from common.own_experts.switch_transformers import (
    OwnSwitchTransformersForConditionalGeneration,
    SwitchTransformersForSequenceClassification,
)
from tests.tiny_models import ENCODER_DECODER_FAMILIES, NUM_EXPERTS, TOP_K, make_checkpoint, make_model

SWITCH = "switch_transformers"
FAMILIES = ("llama4_text", "dbrx", *ENCODER_DECODER_FAMILIES)
INPUT_IDS = torch.randint(3, 128, (3, 11), generator=torch.Generator().manual_seed(1))
LABELS = torch.randint(3, 128, (3, 7), generator=torch.Generator().manual_seed(2))


def inputs_of(model: PreTrainedModel) -> dict[str, Tensor]:
    inputs = {"input_ids": INPUT_IDS}
    return {**inputs, "decoder_input_ids": LABELS} if model.config.is_encoder_decoder else inputs


def resident(folder: Path) -> PreTrainedModel:
    return load_resident_model(folder, torch.device("cpu"), torch.float32)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_checkpoint_is_saved_as_it_was(family: str, tmp_path: Path) -> None:
    make_checkpoint(family, tmp_path / "library")
    resident(tmp_path / "library").save_pretrained(tmp_path / "ours")
    library, ours = (load_file(tmp_path / name / "model.safetensors") for name in ("library", "ours"))
    assert ours.keys() == library.keys()
    assert all(torch.equal(ours[key], library[key]) for key in library)
    configs = [load_config(tmp_path / name) for name in ("library", "ours")]
    assert configs[0].architectures == configs[1].architectures


@pytest.mark.parametrize("family", ["llama4_text", "dbrx", SWITCH])
def test_resident_logits_equal_the_librarys(family: str, tmp_path: Path) -> None:
    make_checkpoint(family, tmp_path)
    library = make_model(family)
    with torch.inference_mode():
        expected = library(**inputs_of(library)).logits
        actual = resident(tmp_path)(**inputs_of(library)).logits
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_routing_is_seen_layer_by_layer_and_can_be_replaced(family: str, tmp_path: Path) -> None:
    top_k = {"num_experts_per_tok": 1} if family == "llama4_text" else {}
    architecture = describe_architecture(make_checkpoint(family, tmp_path, num_layers=4, **top_k))
    model = resident(tmp_path)
    seen: list[tuple[int, Tensor]] = []

    def intercept(layer: int, ids: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        seen.append((layer, ids))
        return ids, weights

    def other_experts(_layer: int, ids: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        return (ids + 1) % NUM_EXPERTS, weights

    with (
        torch.inference_mode(),
        recorded_router_logits(model) as logits,
        intercepted_routing(model, intercept),
    ):
        output = model(**inputs_of(model)).logits
    with torch.inference_mode(), intercepted_routing(model, other_experts):
        assert not torch.allclose(model(**inputs_of(model)).logits, output, atol=1e-2)
    assert [layer for layer, _ in seen] == list(range(architecture.num_layers))
    for (layer, ids), layer_logits in zip(seen, logits, strict=True):
        num_tokens = LABELS.numel() if layer >= architecture.num_encoder_layers > 0 else INPUT_IDS.numel()
        assert layer_logits.shape == (num_tokens, NUM_EXPERTS)
        assert torch.equal(ids, layer_logits.topk(architecture.top_k).indices)


@pytest.mark.parametrize("family", ENCODER_DECODER_FAMILIES)
def test_encoder_layers_come_first(family: str, tmp_path: Path) -> None:
    architecture = describe_architecture(make_checkpoint(family, tmp_path, num_layers=4))
    assert architecture.is_encoder_decoder
    assert (architecture.num_layers, architecture.num_encoder_layers) == (4, 2)
    assert ["encoder" in name.split(".") for name in architecture.experts_modules] == [True] * 2 + [False] * 2
    assert (architecture.hidden_size, architecture.max_context_tokens) == (64, 512)
    assert architecture.top_k == (1 if family == SWITCH else TOP_K)


def test_nllb_that_draws_experts_at_random_is_refused(tmp_path: Path) -> None:
    folder = make_checkpoint("nllb-moe", tmp_path, second_expert_policy="sampling")
    with pytest.raises(
        UnsupportedModelError, match="second_expert_policy='sampling' draws experts at random"
    ):
        describe_architecture(folder)


def test_switch_drops_no_token_whatever_the_capacity(tmp_path: Path) -> None:
    logits = []
    for capacity in (512, 1):
        model = resident(make_checkpoint(SWITCH, tmp_path / str(capacity), expert_capacity=capacity))
        with torch.inference_mode():
            logits.append(model(**inputs_of(model)).logits)
    assert torch.equal(*logits)


def switch_config(**config: object) -> PretrainedConfig:
    """Of a Switch model whose training draws nothing at random."""
    fields = {"dropout_rate": 0.0, "router_jitter_noise": 0.0, **config}
    return make_model(SWITCH, num_layers=4, **fields).config


def test_switch_trains_as_the_library_does(tmp_path: Path) -> None:
    torch.manual_seed(0)
    ours = OwnSwitchTransformersForConditionalGeneration(switch_config())
    ours.save_pretrained(tmp_path)
    library = AutoModelForSeq2SeqLM.from_pretrained(tmp_path)
    for model in (ours, library):
        model.train()(input_ids=INPUT_IDS, labels=LABELS).loss.backward()
    torch.testing.assert_close(ours.shared.weight.grad, library.shared.weight.grad, rtol=1e-3, atol=1e-6)
    for name, module in ours.named_modules():
        if name.endswith(".mlp.experts"):
            theirs = library.get_submodule(name)
            for mine, linear in (("up_proj", "wi"), ("down_proj", "wo")):
                gradients = [getattr(theirs[f"expert_{i}"], linear).weight.grad for i in range(NUM_EXPERTS)]
                for gradient, expected in zip(module.get_parameter(mine).grad, gradients, strict=True):
                    expected = torch.zeros_like(gradient) if expected is None else expected  # nobody's expert
                    torch.testing.assert_close(gradient, expected, rtol=1e-3, atol=1e-6)
            router = name.removesuffix("experts") + "router.classifier.weight"
            torch.testing.assert_close(
                ours.get_parameter(router).grad, library.get_parameter(router).grad, rtol=1e-3, atol=1e-6
            )


def test_a_new_switch_model_has_the_librarys_initial_spread() -> None:
    torch.manual_seed(0)
    model = OwnSwitchTransformersForConditionalGeneration(switch_config())
    experts = model.encoder.block[1].layer[-1].mlp.experts
    assert experts.up_proj.std().item() == pytest.approx(64**-0.5, rel=0.05)
    assert experts.down_proj.std().item() == pytest.approx(64**-0.5, rel=0.05)
    assert not torch.equal(experts.up_proj[0], experts.up_proj[1])
    assert model.encoder.block[1].layer[-1].mlp.router.classifier.weight.std().item() > 0.8


def test_switch_adds_the_router_losses() -> None:
    torch.manual_seed(0)
    model = OwnSwitchTransformersForConditionalGeneration(switch_config()).eval()
    with recorded_router_logits(model) as recorded:
        output = model(input_ids=INPUT_IDS, labels=LABELS, output_router_logits=True)
    logits = torch.cat([layer.view(len(LABELS), -1, NUM_EXPERTS) for layer in recorded[2:]], dim=1)
    z_loss = switch_modeling.router_z_loss_func(logits)
    aux_loss = switch_modeling.load_balancing_loss_func(logits.softmax(-1), logits.argmax(-1))
    torch.testing.assert_close(output.decoder_z_loss, z_loss)
    torch.testing.assert_close(output.decoder_aux_loss, aux_loss)
    assert output.loss > model(input_ids=INPUT_IDS, labels=LABELS).loss


def test_a_router_explores_in_training_only() -> None:
    torch.manual_seed(0)
    model = OwnSwitchTransformersForConditionalGeneration(switch_config(router_jitter_noise=0.5))
    router, hidden = model.encoder.block[1].layer[-1].mlp.router, torch.randn(1, 5, 64)
    assert not torch.equal(router.train()(hidden)[2], router(hidden)[2])
    assert torch.equal(router.eval()(hidden)[2], router(hidden)[2])


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> SwitchTransformersForSequenceClassification:
    """Fine-tuned from a text-to-text checkpoint until it knows three texts by heart."""
    torch.manual_seed(0)
    model = SwitchTransformersForSequenceClassification.from_pretrained(
        make_checkpoint(SWITCH, tmp_path_factory.mktemp("pretrained"), num_layers=4),
        id2label={0: "no", 1: "yes", 2: "maybe"},
        label2id={"no": 0, "yes": 1, "maybe": 2},
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(12):
        loss = model.train()(input_ids=INPUT_IDS, labels=torch.arange(3)).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval()


@torch.inference_mode()
def test_a_classifier_learns_and_is_loaded_by_its_architecture(
    classifier: SwitchTransformersForSequenceClassification, tmp_path: Path
) -> None:
    logits = classifier(input_ids=INPUT_IDS).logits
    assert logits.argmax(-1).tolist() == [0, 1, 2]
    folder = tmp_path / "tuned"
    classifier.save_pretrained(folder)
    config = load_config(folder)
    assert model_class(config) is SwitchTransformersForSequenceClassification
    assert (config.architectures, config.num_labels) == (
        [SwitchTransformersForSequenceClassification.__name__],
        3,
    )
    assert torch.equal(resident(folder)(input_ids=INPUT_IDS).logits, logits)
    architecture = describe_architecture(folder)
    assert not architecture.is_encoder_decoder
    assert architecture.num_layers == architecture.num_encoder_layers == 2
    assert architecture.labels == ("no", "yes", "maybe")
    assert not any(name.startswith("decoder") for name in meta_model(config, folder).state_dict())


@torch.inference_mode()
def test_padding_does_not_change_a_class(classifier: SwitchTransformersForSequenceClassification) -> None:
    alone = classifier(input_ids=INPUT_IDS[:1, :6]).logits
    mask = (torch.arange(11) < 6).long().unsqueeze(0)
    padded = classifier(input_ids=INPUT_IDS[:1], attention_mask=mask).logits
    torch.testing.assert_close(padded, alone)


def test_the_librarys_encoder_reads_a_classifier(
    classifier: SwitchTransformersForSequenceClassification, tmp_path: Path
) -> None:
    classifier.save_pretrained(tmp_path / "tuned")
    encoder = SwitchTransformersEncoderModel.from_pretrained(tmp_path / "tuned").eval()
    with torch.inference_mode():
        expected = encoder(input_ids=INPUT_IDS).last_hidden_state
        actual = classifier.encoder(input_ids=INPUT_IDS).last_hidden_state
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)
