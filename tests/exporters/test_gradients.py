import torch

from exporters.quantize.mixture import collect_weight_moments


def test_the_model_is_left_as_it_was(tiny_model):
    model, _ = tiny_model()
    wanted = {name: p.requires_grad for name, p in model.named_parameters()}
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    ids = torch.randint(3, model.config.vocab_size, (2, 12), generator=torch.Generator().manual_seed(2))
    first, again = (collect_weight_moments(model, ["model.layers.1.mlp.down_proj"], ids) for _ in range(2))
    for name, parameter in model.named_parameters():
        assert parameter.grad is None
        assert parameter.requires_grad == wanted[name]
        assert torch.equal(parameter, before[name])
    assert not any(m._forward_hooks for m in model.modules())
    for name, moments in first.items():
        assert torch.equal(moments.rows, again[name].rows)
