import torch
from safetensors.torch import load_file, save_file

from torchdsc.models import DSCGPTForCausalLM


def test_a_checkpoint_with_scalar_gammas_loads_and_is_saved_as_new_ones(make_model, input_ids, tmp_path):
    model = make_model("dsc, attention", feed_forward_options={"channelwise_gamma": False})
    for name, parameter in model.named_parameters():
        if name.endswith("gamma"):
            torch.nn.init.normal_(parameter)
    model.save_pretrained(tmp_path / "new")
    state = load_file(tmp_path / "new" / "model.safetensors")
    gammas = [name for name in state if name.endswith("gamma")]
    assert [state[name].shape for name in gammas] == [(1,)] * 4
    old = {name: value.reshape(()) if name in gammas else value for name, value in state.items()}
    model.config.save_pretrained(tmp_path / "old")
    save_file(old, tmp_path / "old" / "model.safetensors", metadata={"format": "pt"})
    for folder in ("old", "new"):
        loaded, info = DSCGPTForCausalLM.from_pretrained(tmp_path / folder, output_loading_info=True)
        assert not any(info.values())
        assert torch.equal(loaded(input_ids).logits, model(input_ids).logits)
    loaded.save_pretrained(tmp_path / "again")
    again = load_file(tmp_path / "again" / "model.safetensors")
    assert all(torch.equal(again[name], state[name]) for name in state)
