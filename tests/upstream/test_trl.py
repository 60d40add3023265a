"""TRL's trainers on patched models: from a folder, from memory, with adapters; what is saved loads elsewhere."""

import copy
import os
import subprocess
import sys
import textwrap

import pytest
import torch
import transformers
from datasets import Dataset
from peft import LoraConfig
from tokenizers import ByteLevelBPETokenizer
from transformers import PreTrainedTokenizerFast

from hf_multimax import is_patched, multimax_parameters, patch_model
from tests.zoo import zoo_model

os.environ["CI"] = "1"  # TRL sends nothing
trl = pytest.importorskip("trl")
pytestmark = pytest.mark.slow

TEXT = "hello world, this is a text about nothing in particular. "
IDS = torch.tensor([[5, 6, 7, 8, 9]])


@pytest.fixture(scope="module")
def tokenizer():
    trained = ByteLevelBPETokenizer()
    trained.train_from_iterator([TEXT] * 3, vocab_size=300, special_tokens=["<pad>", "<bos>", "<eos>"])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=trained._tokenizer, pad_token="<pad>", eos_token="<eos>")
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    return tokenizer


def model(options=None, name="LlamaForCausalLM"):
    made = zoo_model(name, vocab_size=300)
    if options is not None:
        patch_model(made, **options)
        with torch.no_grad():
            for parameter in multimax_parameters(made).values():
                parameter.add_(0.1 * torch.randn_like(parameter))
    return made


@pytest.fixture
def folder(tmp_path, tokenizer):
    model({}).save_pretrained(tmp_path / "patched")
    tokenizer.save_pretrained(tmp_path / "patched")
    return tmp_path / "patched"


def arguments(kind, folder, **options):
    return kind(
        output_dir=str(folder / "out"), max_steps=2, per_device_train_batch_size=2, report_to=[], use_cpu=True,
        save_strategy="no", learning_rate=1e-2, **{"bf16": False, **options},
    )  # fmt: skip


def texts():
    return Dataset.from_dict({"text": [TEXT * 2, TEXT[:20]] * 4})


def preferences():
    return Dataset.from_dict({"prompt": ["hello "] * 4, "chosen": ["world, this"] * 4, "rejected": ["nothing"] * 4})


def trained(trainer):
    """Train; every scalar that is trained has moved."""
    before = {name: value.clone() for name, value in multimax_parameters(trainer.model).items()}
    trainer.train()
    after = multimax_parameters(trainer.model)
    moved = [name for name, value in after.items() if not torch.equal(value, before[name])]
    assert [name for name, value in after.items() if value.requires_grad] == moved or not before
    return moved


def assert_loads_elsewhere(trainer, path):
    """Saved, and loaded in a process that knows nothing of this one: the same logits."""
    trainer.save_model(str(path))
    saved = trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False).eval()
    with torch.no_grad():
        expected = saved(IDS).logits
    torch.save(expected, path / "expected.pt")
    code = f"""
    import hf_multimax, torch
    from transformers import AutoModelForCausalLM
    model = AutoModelForCausalLM.from_pretrained({str(path)!r}).eval()
    assert hf_multimax.is_patched(model)
    with torch.no_grad():
        found = model(torch.tensor({IDS.tolist()})).logits
    torch.testing.assert_close(found, torch.load({str(path / "expected.pt")!r}))
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("options", [{}, {"bf16": True, "gradient_checkpointing": True}, {"packing": True}], ids=str)
@pytest.mark.parametrize("source", ["folder", "memory"])
def test_sft(source, options, folder, tokenizer, tmp_path):
    trainer = trl.SFTTrainer(
        str(folder) if source == "folder" else model({"order": 1}),
        args=arguments(trl.SFTConfig, tmp_path, **({"max_length": 32} if options.get("packing") else {}), **options),
        train_dataset=texts(),
        processing_class=tokenizer,
    )
    assert is_patched(trainer.model) and type(trainer.model).__name__ == "LlamaForCausalLM"
    assert len(trained(trainer)) == 4
    assert_loads_elsewhere(trainer, tmp_path / "saved")


def test_sft_gives_a_stock_models_losses_while_the_scalars_are_zero(tokenizer, tmp_path):
    losses = []
    for options in (None, {}):
        made = zoo_model("LlamaForCausalLM", vocab_size=300)
        made = made if options is None else patch_model(made)
        trainer = trl.SFTTrainer(
            made, args=arguments(trl.SFTConfig, tmp_path, logging_steps=1), train_dataset=texts(),
            processing_class=tokenizer,
        )  # fmt: skip
        trainer.train()
        losses.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry][0])
    assert losses[0] == pytest.approx(losses[1], abs=1e-4)


@pytest.mark.parametrize("scalars", [True, False])
def test_sft_with_lora(scalars, folder, tokenizer, tmp_path):
    lora = LoraConfig(target_modules=["q_proj"], modules_to_save=["multimax"] if scalars else None)
    trainer = trl.SFTTrainer(
        str(folder), args=arguments(trl.SFTConfig, tmp_path), train_dataset=texts(), processing_class=tokenizer,
        peft_config=lora,
    )  # fmt: skip
    trainer.train()
    assert_loads_elsewhere(trainer, tmp_path / "saved")


@pytest.mark.parametrize("trainer", ["SFTTrainer", "DPOTrainer", "KTOTrainer"])
def test_an_output_modulator_is_refused_by_the_way_out(trainer, tokenizer, tmp_path):
    config = getattr(trl, trainer.replace("Trainer", "Config"))
    data = {"SFTTrainer": texts, "DPOTrainer": preferences}.get(trainer, _labelled)()
    more = {} if trainer == "SFTTrainer" else {"ref_model": model({})}
    with pytest.raises(ValueError, match=r"output modulator.*MultiMaxTrainer.*output=False"):
        getattr(trl, trainer)(
            model({"output": True}), args=arguments(config, tmp_path), train_dataset=data, processing_class=tokenizer,
            **more,
        )  # fmt: skip


def _labelled():
    return Dataset.from_dict({"prompt": ["hello "] * 4, "completion": ["world"] * 4, "label": [True, False] * 2})


@pytest.mark.parametrize("way", ["folder", "memory, with a reference", "adapter"])
def test_dpo(way, folder, tokenizer, tmp_path):
    options = {}
    if way == "folder":
        start = str(folder)
    else:
        start = model({})
        options = {"ref_model": copy.deepcopy(start)} if "reference" in way else {}
        if way == "adapter":
            options = {"peft_config": LoraConfig(target_modules=["q_proj"], modules_to_save=["multimax"])}
    trainer = trl.DPOTrainer(
        start,
        args=arguments(trl.DPOConfig, tmp_path),
        train_dataset=preferences(),
        processing_class=tokenizer,
        **options,
    )
    assert trainer.ref_model is None or is_patched(trainer.ref_model)
    trainer.train()
    assert trainer.state.log_history


def test_dpo_of_a_model_patched_in_memory_says_what_to_give(tokenizer, tmp_path):
    zoo_model("LlamaForCausalLM", vocab_size=300).save_pretrained(tmp_path / "stock")
    start = patch_model(transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "stock"))
    with pytest.raises(ValueError, match=r"stock checkpoint.*ref_model=copy\.deepcopy\(model\)"):
        trl.DPOTrainer(
            start, args=arguments(trl.DPOConfig, tmp_path), train_dataset=preferences(), processing_class=tokenizer
        )


def test_reward_models(folder, tokenizer, tmp_path):
    data = Dataset.from_dict({"chosen": ["hello world"] * 4, "rejected": ["nothing"] * 4})
    trainer = trl.RewardTrainer(
        str(folder), args=arguments(trl.RewardConfig, tmp_path), train_dataset=data, processing_class=tokenizer
    )
    assert is_patched(trainer.model)
    assert len(trained(trainer)) == 4
