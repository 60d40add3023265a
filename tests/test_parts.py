"""MultiMax models as parts of composite ones: patched together they load as they were, and nothing is lost."""

import pytest
import torch
import transformers
from test_architectures import randomised
from transformers import AutoConfig, EncoderDecoderModel, VisionEncoderDecoderModel, VisionTextDualEncoderModel
from zoo import zoo_model

from hf_multimax import is_patched, multimax_parameters, patch_model

IDS = torch.tensor([[3, 4, 5, 6]])
PIXELS = torch.randn(1, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def text(folder, options=None, **config):
    model = transformers.BertLMHeadModel(
        transformers.BertConfig(
            vocab_size=31, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, **config
        )
    ).eval()
    if options is not None:
        randomised(patch_model(model, **options), 0.3)
    (model.bert if not config else model).save_pretrained(folder)
    return folder


def image(folder, options=None):
    model = zoo_model("ViTForImageClassification")
    if options is not None:
        randomised(patch_model(model, **options), 0.3)
    model.vit.save_pretrained(folder)
    return folder


def encoder_decoder(folder, options):
    decoder = text(folder / "decoder", options, is_decoder=True, add_cross_attention=True)
    model = EncoderDecoderModel.from_encoder_decoder_pretrained(text(folder / "encoder", options), decoder)
    return model.eval(), {"input_ids": IDS, "decoder_input_ids": IDS}


def vision_encoder_decoder(folder, options):
    decoder = text(folder / "decoder", options, is_decoder=True, add_cross_attention=True)
    model = VisionEncoderDecoderModel.from_encoder_decoder_pretrained(image(folder / "encoder", options), decoder)
    return model.eval(), {"pixel_values": PIXELS, "decoder_input_ids": IDS}


def dual_encoder(folder, options):
    model = VisionTextDualEncoderModel.from_vision_text_pretrained(
        image(folder / "vision", options), text(folder / "text", options), projection_dim=8
    )
    return model.eval(), {"input_ids": IDS, "pixel_values": PIXELS}


def llava(folder, options):
    part = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    config = transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(**part, image_size=16, patch_size=8, projection_dim=16),
        text_config=transformers.LlamaConfig(**part, vocab_size=64, num_key_value_heads=2),
        image_token_index=60, vision_feature_layer=-1, image_seq_length=4,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.LlavaForConditionalGeneration(config).eval()
    if options is not None:
        randomised(patch_model(model.model.language_model, **options), 0.3)
        randomised(patch_model(model.model.vision_tower, **options), 0.3)
    return model, {"input_ids": torch.tensor([[3, 60, 60, 60, 60, 5]]), "pixel_values": PIXELS}


COMPOSITES = [encoder_decoder, vision_encoder_decoder, dual_encoder, llava]


def outputs(model, batch):
    with torch.no_grad():
        return model(**batch)[0]


@pytest.mark.parametrize("make", COMPOSITES)
def test_patched_parts_of_a_stock_whole_do_not_save_as_softmax(make, tmp_path):
    model, batch = make(tmp_path, {"order": 1})
    expected = outputs(model, batch)
    with pytest.raises(ValueError, match="inside a stock one.*patch_model on the whole"):
        model.save_pretrained(tmp_path / "whole")
    assert not (tmp_path / "whole").exists()
    values = {name: value.clone() for name, value in multimax_parameters(model).items()}
    patch_model(model)  # the way out: the whole takes over the scalars
    assert is_patched(model) and model.config.multimax["order"] == 1
    assert all(torch.equal(multimax_parameters(model)[name], value) for name, value in values.items())
    torch.testing.assert_close(outputs(model, batch), expected)
    model.save_pretrained(tmp_path / "whole")
    loaded = type(model).from_pretrained(tmp_path / "whole")
    torch.testing.assert_close(outputs(loaded, batch), expected)


@pytest.mark.parametrize("make", COMPOSITES)
def test_a_whole_patched_together_saves_and_loads(make, tmp_path):
    model, batch = make(tmp_path, None)
    stock = outputs(model, batch)
    patch_model(model)
    torch.testing.assert_close(outputs(model, batch), stock)
    expected = outputs(randomised(model, 0.3), batch)
    model.save_pretrained(tmp_path / "whole")
    for loader in (type(model), type(model).__mro__[2]):
        torch.testing.assert_close(outputs(loader.from_pretrained(tmp_path / "whole"), batch), expected)
    again = type(model)(model.config)  # built from the config of the patched one
    assert len(multimax_parameters(again)) == len(multimax_parameters(model))


def test_parts_patched_unlike_are_refused_and_left_as_they_were(tmp_path):
    model, batch = encoder_decoder(tmp_path, {"order": 1})
    randomised(patch_model(transformers.BertModel(transformers.BertConfig(
        vocab_size=31, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
    ))), 0.3).save_pretrained(tmp_path / "other")  # fmt: skip
    model.encoder = transformers.AutoModel.from_pretrained(tmp_path / "other")
    expected = outputs(model, batch)
    with pytest.raises(ValueError, match="different configs"):
        patch_model(model)
    with pytest.raises(ValueError, match="have no place"):
        patch_model(model, hf_config(order=3))
    assert is_patched(model.encoder) and is_patched(model.decoder) and not is_patched(model)
    assert torch.equal(outputs(model, batch), expected)


def hf_config(**options):
    from hf_multimax import MultiMaxConfig

    return MultiMaxConfig(**options)


def test_a_part_patched_with_an_output_modulator_keeps_it(tmp_path):
    encoder = text(tmp_path / "encoder", {})
    decoder = text(tmp_path / "decoder", {"output": True}, is_decoder=True, add_cross_attention=True)
    model = EncoderDecoderModel.from_encoder_decoder_pretrained(encoder, decoder).eval()
    batch = {"input_ids": IDS, "decoder_input_ids": IDS}
    expected = outputs(model, batch)
    patch_model(model)
    assert model.multimax_output.ts.abs().sum() > 0 and not hasattr(model.decoder, "multimax_output")
    torch.testing.assert_close(outputs(model, batch), expected)


def test_a_stock_part_with_the_config_of_a_patched_model_is_not_saved(tmp_path):
    settings = patch_model(zoo_model("BertForMaskedLM")).config
    decoder = transformers.BertConfig(**{**settings.to_dict(), "is_decoder": True, "add_cross_attention": True})
    config = transformers.EncoderDecoderConfig.from_encoder_decoder_configs(settings, decoder)
    model = EncoderDecoderModel(config)
    with pytest.raises(ValueError, match="part with the config of a MultiMax model"):
        model.save_pretrained(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_encoder_of_an_encoder_decoder_does_not_save_as_a_whole(tmp_path):
    model = patch_model(zoo_model("BartForConditionalGeneration"))
    text_model = transformers.T5ForConditionalGeneration(
        transformers.T5Config(vocab_size=31, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    )
    with pytest.raises(ValueError, match="whole"):
        patch_model(text_model).encoder.save_pretrained(tmp_path / "out")
    assert not (tmp_path / "out").exists()
    model.model.save_pretrained(tmp_path / "base")
    assert is_patched(transformers.AutoModel.from_pretrained(tmp_path / "base"))
    assert AutoConfig.from_pretrained(tmp_path / "base").architectures == ["BartModel"]
